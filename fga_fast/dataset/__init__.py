"""Data sets as items: what an image is called, where it is, and what is asked about it.

`sources` makes items from folders, manifests and Hugging Face datasets; `items.load` reads one.
"""
