"""What runs inside a kernel: the only place that knows IPython.

`extension.py` plugs the rest in: `rewrite.py` turns `%%step` cells into code, `session.py` holds the run that this
kernel drives, `step.py` decides about one step, `execution.py` carries it out and commits it, `outputs.py` records
and replays what a cell displays, `waits.py` are the gates, `magics.py` is `%durable`.
"""
