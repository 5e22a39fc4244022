"""An explanation as one graph: traced (trace.py), rid of work that nobody reads (simplify.py, rows.py), compiled
(compiled.py) and shipped (package.py).
"""
