"""Headless runs: the worker leases them, an executor per run drives papermill and a kernel.

Nothing is imported here: papermill loads `engine` as an entry point, and the CLI needs `notebooks` only.
"""
