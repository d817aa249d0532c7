"""Checkpoints: what a cell wrote, its fingerprints, its bytes, and how they come back.

A library over a namespace (a dict) and a folder of blobs. Must not know IPython, HTTP or the coordinator.
Heavy packages (NumPy, pandas, polars, Arrow) are never imported here: where the namespace holds their
values, they are loaded already.
"""
