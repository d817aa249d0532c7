"""Many cells brought back by one request of the runner: up to the first one that must run code.

Owns the order around them, and the marks by which the runner knows what each displayed. Each cell goes through all that
IPython does around a cell, so hooks, history and prompts are what they are for cells that are sent one by one.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from nbdurable import contract
from nbdurable.kernel import extension
from nbdurable.kernel.session import Session
from nbdurable.kernel.step import Steps

_KNOWN = {
    "IPython",
    "ipykernel",
    "matplotlib_inline",
    "asyncio",
    "signal",
    "_signal",
    "nbdurable",
    "traitlets",
}


def bring_back(cells: Sequence[tuple[str, str]]) -> None:
    """Restore cells, given as (id, source), in order; one that must run code, and those behind it, are left alone.

    A mark stands between what two cells display: `ended` tells how a cell ended, `begins` which one follows. To be
    called by a silent request: a cell that runs cells would be one itself.
    """
    steps = extension.steps()
    if steps is None or len(steps.shell.ast_transformers) > 1:  # another one's may change what a cell says
        return
    with steps.session.tracker.only_restores() if _is_alone(steps.session) else nullcontext():
        _one_by_one(steps, cells)


def _one_by_one(steps: Steps, cells: Sequence[tuple[str, str]]) -> None:
    shell = steps.shell
    ended: dict[str, Any] | None = None
    try:
        for cell_id, source in cells:
            try:
                transformed = shell.transform_cell(source)
            except Exception:  # it is said when the cell runs by itself
                break
            if not steps.foresee(source, transformed, cell_id):
                break
            _mark(shell, ended, cell_id)
            ended = {"cell": cell_id}
            error = _run(shell, source, transformed, cell_id)
            ended["execution_count"] = shell.execution_count - 1
            if error is not None:
                ended["error"] = {
                    "ename": type(error).__name__,
                    "evalue": str(error),
                    "traceback": list(shell._last_traceback or ()),
                }
                break
    finally:
        if ended is not None:
            _mark(shell, ended, None)


def _is_alone(session: Session) -> bool:
    """Tell whether none of the notebook's code can run while this request does nothing but restore.

    Not as a thread, at a signal, as a hook of IPython's or of the streams, or through a tracer. Nor may a value be
    replaced that a person sets by hand (`--set`).
    """
    shell = session.shell
    hooks = [hook for registered in shell.events.callbacks.values() for hook in registered]
    hooks += [*shell.input_transformers_cleanup, *shell.input_transformers_post]
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    ours = {thread.ident for thread in threading.enumerate() if thread.name.startswith("nbdurable-")}
    return (
        sys._current_frames().keys() <= session.threads | ours
        and all(_is_known(hook) for hook in hooks)
        and all(_is_known(handler) for handler in handlers if callable(handler))
        and all(type(stream).__module__ == "ipykernel.iostream" for stream in (sys.stdout, sys.stderr))
        and not getattr(shell.display_pub, "_hooks", ())
        and not getattr(shell.displayhook, "_hooks", ())
        and not (session.run is not None and session.run.hand_set)
        and sys.gettrace() is None
        and sys.getprofile() is None
    )


def _is_known(hook: Any) -> bool:
    module = getattr(hook, "__module__", None) or ""
    return module.partition(".")[0] in _KNOWN


def _run(shell: Any, source: str, transformed: str, cell_id: str) -> BaseException | None:
    """Run a cell as ipykernel does; return the error that it ended with."""
    running = shell.run_cell_async(source, store_history=True, transformed_cell=transformed, cell_id=cell_id)
    result: Any = None
    error: BaseException | None = None
    try:
        running.send(None)  # a call of ours is all that runs: it awaits nothing
    except StopIteration as done:
        result = done.value
    except KeyboardInterrupt as interrupt:
        error = interrupt
    finally:
        running.close()
        shell.events.trigger("post_execute")
        shell.events.trigger("post_run_cell", result)
    return error or result.error_before_exec or result.error_in_exec


def _mark(shell: Any, ended: dict[str, Any] | None, begins: str | None) -> None:
    shell.display_pub.publish({contract.CELL_MARK: {"ended": ended, "begins": begins}})
