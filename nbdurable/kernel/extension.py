"""Plugs nbdurable into IPython, and out again (`%load_ext nbdurable`)."""

from __future__ import annotations

from typing import Any

from nbdurable.kernel import display, session
from nbdurable.kernel.rewrite import HOOK, rewrite_lines
from nbdurable.kernel.session import Session
from nbdurable.kernel.step import Steps

_steps: Steps | None = None


def steps() -> Steps | None:
    """Return the hooks of this kernel, or None where the extension is not loaded."""
    return _steps


def load_ipython_extension(shell: Any) -> None:
    """Load the extension; loaded twice, it stays as it is.

    Raises what keeps the session from beginning: then IPython may load it again, and the cells below do not run.
    """
    global _steps
    if _steps is not None:
        return
    from nbdurable.kernel import magics, questions

    found = Session(shell)
    greeting = None if found.headless else magics.greet(found)
    session.set_current(found)
    _steps = Steps(found)
    shell.user_ns_hidden[HOOK] = _steps
    shell.input_transformers_cleanup.append(rewrite_lines)
    shell.ast_transformers.append(_steps)
    shell.events.register("pre_run_cell", _steps.pre_run_cell)
    shell.events.register("post_run_cell", _steps.post_run_cell)
    shell.register_magics(magics.DurableMagics(shell, found))
    questions.install(found)
    if found.settings.ledger:
        from nbdurable.kernel.ledger import ledger

        ledger()
    if greeting is not None:
        display.say(shell, greeting)


def unload_ipython_extension(shell: Any) -> None:
    """Unload the extension: the run is paused, its checkpoints stay."""
    global _steps
    if _steps is None:
        return
    shell.input_transformers_cleanup.remove(rewrite_lines)
    shell.ast_transformers.remove(_steps)
    shell.events.unregister("pre_run_cell", _steps.pre_run_cell)
    shell.events.unregister("post_run_cell", _steps.post_run_cell)
    shell.user_ns.pop(HOOK, None)

    from nbdurable.kernel import questions

    questions.uninstall(_steps.session)
    _steps.session.close()
    session.set_current(None)
    _steps = None
