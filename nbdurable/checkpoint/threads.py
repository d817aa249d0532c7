"""Threads: whether code of the notebook may run beside the main thread, and change a value that is looked at.

Owns which threads are the kernel's own. Knows nothing of values.
"""

from __future__ import annotations

import threading

_OURS = frozenset({"ipykernel", "IPython", "jupyter_client", "zmq", "tornado", "nbdurable"})


def others_run() -> bool:
    """Tell whether a thread lives that is neither this one, nor the main one, nor one of those that serve the kernel.

    An idle thread of a pool counts: nobody can know what it is given next.
    """
    here = (threading.current_thread(), threading.main_thread())
    return any(thread not in here and not _serves(thread) for thread in threading.enumerate())


def _serves(thread: threading.Thread) -> bool:
    target = getattr(thread, "_target", None)
    modules = (type(thread).__module__, getattr(target, "__module__", None) or "")
    return any(module.partition(".")[0] in _OURS for module in modules)
