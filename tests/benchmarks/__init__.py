"""Measured, never promised: each module prints a table of ratios against peers run beside it, and writes JSON.

python -m tests.benchmarks.commit
python -m tests.benchmarks.headless
"""
