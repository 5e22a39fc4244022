"""An explanation as one graph: traced (trace.py), simplified (passes/), compiled (compiled.py), exported (package/)."""
