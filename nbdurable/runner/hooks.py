"""How a headless run's hooks are told: functions of its notebook in its kernel, those of the settings beside it.

Owns the order (that it begins is on disk, the hook, how it ended is on disk) and the time limits. Nothing that a hook
does changes the run; what is told, and whether it was told before, is the coordinator's to know.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from nbdurable.client import Client
from nbdurable.contract import BEGIN_HOOK, END_HOOK, BeginHook, EndHook
from nbdurable.errors import Fenced
from nbdurable.models import ErrorInfo, HookKind, Occasion
from nbdurable.runner.kernels import Kernel
from nbdurable.settings import Home, Settings
from nbdurable.telemetry import fault_point

MODULE = "nbdurable.kernel.hooks"
_IN_KERNEL = f"__import__({MODULE!r}, fromlist=['tell'])"
_READY_S = 10.0
_AGAIN_S = 3.0  # between interrupts of a hook that took too long
_INTERRUPTS = 2
_KINDS: dict[str, HookKind] = {
    "start": "start",
    "resume": "resume",
    "complete": "success",
    "fail": "failure",
    "time_out": "failure",
    "lose": "failure",  # where it was lost once too often
    "suspend": "wait",
    "pause": "wait",
    "cancel": "cancel",
}


class Hooks:
    """The hooks of one run, while one executor drives it."""

    def __init__(
        self,
        client: Client,
        home: Home,
        settings: Settings,
        kernel: Kernel | None,
        *,
        run_id: str,
        epoch: int,
        log: TextIO,
    ) -> None:
        self._client = client
        self._home = home
        self._settings = settings
        self._kernel = kernel
        self._run_id = run_id
        self._epoch = epoch
        self._log = log
        self._line_open = False  # the log's last line has no end yet
        self._registered: Mapping[str, Mapping[str, bool]] = {}

    async def look(self, kernel_client: Any) -> None:
        """Take note of the functions that the notebook has registered."""
        said = await self._ask(kernel_client, "", "registered()", _READY_S, patient=False)
        self._registered = json.loads(said) if said else {}

    async def tell_beginning(self, kernel_client: Any, how: str) -> None:
        """Tell hooks that the run starts or resumes, before its first step."""
        await self.look(kernel_client)
        await self._tell(how, "", None, kernel_client)

    def tell_end(self, how: str, reason: str, error: ErrorInfo | None) -> None:
        """Tell hooks what the driver is about to say of the run; in the kernel where it lives."""
        from jupyter_core.utils import run_sync

        if how in _KINDS:
            run_sync(self._tell_end)(how, reason, error)

    async def _tell_end(self, how: str, reason: str, error: ErrorInfo | None) -> None:
        kernel = self._kernel
        if kernel is None or not self._registered.get(_KINDS[how]) or kernel.exit_status is not None:
            await self._tell(how, reason, error, None)
            return
        kernel_client = kernel.manager.client()
        kernel_client.start_channels()
        try:
            await kernel_client.wait_for_ready(timeout=_READY_S)
            await self._tell(how, reason, error, kernel_client)
        except Exception as trouble:  # it fell silent, as a rule
            self._say(f"hooks of the notebook are not told: {trouble}")
            await self._tell(how, reason, error, None)
        finally:
            kernel_client.stop_channels()

    async def _tell(self, how: str, reason: str, error: ErrorInfo | None, kernel_client: Any) -> None:
        kind = _KINDS[how]
        question = BeginHook(
            run_id=self._run_id, epoch=self._epoch, kind=kind, name="", how=how, reason=reason, error=error
        )
        names = self._registered.get(kind, {}) if kernel_client is not None else {}
        try:
            for name, is_async in names.items():
                if occasion := self._begin(question, name):
                    failure = await self._tell_kernel(kernel_client, name, is_async, occasion)
                    self._end(name, occasion, failure)
            wanted = self._settings.hooks.get(kind)
            if wanted is not None:
                name = f"settings: {wanted if isinstance(wanted, str) else ' '.join(wanted)}"
                if occasion := self._begin(question, name):
                    self._end(name, occasion, self._tell_process(wanted, occasion))
        except Fenced:
            pass  # somebody else drives the run: the lease's end tells
        except Exception as trouble:  # of whatever kind: the run ends as it would have
            self._say(f"hooks are not told: {type(trouble).__name__}: {trouble}")

    def _begin(self, question: BeginHook, name: str) -> Occasion | None:
        begun = self._client.call(BEGIN_HOOK, question.model_copy(update={"name": name}))
        if begun.occasion is not None:
            self._say(f"hook {name} ({question.kind})")
            fault_point("hook-begun")
        return begun.occasion

    def _end(self, name: str, occasion: Occasion, error: ErrorInfo | None) -> None:
        fault_point("hook-ran")
        if error is not None:
            self._say(f"hook {name} ({occasion.kind}) failed: {error.name}: {error.message}")
        ended = EndHook(
            run_id=self._run_id,
            epoch=self._epoch,
            kind=occasion.kind,
            name=name,
            key=occasion.key,
            error=error,
        )
        self._client.call(END_HOOK, ended)

    # In the kernel ------------------------------------------------------------------------------------------

    async def _tell_kernel(
        self, kernel_client: Any, name: str, is_async: bool, occasion: Occasion
    ) -> ErrorInfo | None:
        words = f"({name!r}, {occasion.model_dump_json()!r})"
        code = f"await {_IN_KERNEL}.tell_async{words}" if is_async else f"{_IN_KERNEL}.tell{words}"
        limit_s, began = self._settings.hook_timeout_s, time.monotonic()
        patient = occasion.kind in ("start", "resume")  # the kernel is needed: its steps follow
        said = await self._ask(kernel_client, code, "report()", limit_s, patient=patient)
        if self._line_open:
            self._write("\n")
        if time.monotonic() - began >= limit_s:
            return _too_long(limit_s)
        if said is None:
            return ErrorInfo(name="KernelDied", message="the kernel died, or did not say how it ended")
        error = json.loads(said)
        return None if error is None else ErrorInfo(name=error[0], message=error[1])

    async def _ask(
        self, kernel_client: Any, code: str, expression: str, limit_s: float, *, patient: bool
    ) -> str | None:
        """Run code that is no cell, and return the text that an expression gives after it; what it prints is logged.

        It is interrupted when its time is over, again and again where `patient`. None where no answer comes.
        """
        kernel = self._kernel
        assert kernel is not None
        kernel_client.cell_id = None
        asked = kernel_client.execute(
            code,
            silent=True,
            store_history=False,
            user_expressions={"said": f"{_IN_KERNEL}.{expression}"},
        )
        interrupt_at, interrupts = time.monotonic() + limit_s, 0
        idle = False
        while True:
            if kernel.exit_status is not None:
                return None
            if time.monotonic() >= interrupt_at:
                if interrupts >= _INTERRUPTS and not patient:
                    return None
                kernel.interrupt()
                interrupts, interrupt_at = interrupts + 1, time.monotonic() + _AGAIN_S
            channel = kernel_client.shell_channel if idle else kernel_client.iopub_channel
            try:
                message = await channel.get_msg(timeout=0.25)
            except queue.Empty:
                continue
            if message["parent_header"].get("msg_id") != asked:
                continue
            content = message["content"]
            if message["msg_type"] == "stream":
                self._write(content["text"])
            elif message["msg_type"] == "execute_reply":
                found = content.get("user_expressions", {}).get("said", {})
                return ast.literal_eval(found["data"]["text/plain"]) if found.get("status") == "ok" else None
            idle = idle or content.get("execution_state") == "idle"

    # Beside it ----------------------------------------------------------------------------------------------

    def _tell_process(self, wanted: str | tuple[str, ...], occasion: Occasion) -> ErrorInfo | None:
        """Run a hook of the settings in a process of its own, with the occasion as JSON on stdin."""
        limit_s = self._settings.hook_timeout_s
        command = command_of(wanted, self._python())
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=self._kernel.cwd if self._kernel is not None else self._home.root.parent,
                env=environment(self._home),
                start_new_session=sys.platform != "win32",
            )
        except (OSError, ValueError) as error:
            return ErrorInfo(name=type(error).__name__, message=f"{command[0]}: {error}")
        try:
            shown, _ = process.communicate(occasion.model_dump_json().encode(), timeout=limit_s)
        except subprocess.TimeoutExpired:
            _end_group(process)
            return _too_long(limit_s)
        text = shown.decode(errors="replace")
        self._write(text if text.endswith("\n") or not text else f"{text}\n")
        if process.returncode == 0:
            return None
        last = (text.strip().splitlines() or ["it printed nothing"])[-1]
        return ErrorInfo(name="HookError", message=f"it ended with status {process.returncode}: {last}")

    def _python(self) -> str:
        """Return the Python of the kernel, whose packages hooks may need."""
        spec = self._kernel.manager.kernel_spec if self._kernel is not None else None
        first = str(spec.argv[0]) if spec is not None and spec.argv else ""
        return first if Path(first).is_absolute() and Path(first).exists() else sys.executable

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a full disk must not end the run
            self._log.write(text)
            self._log.flush()
        self._line_open = not text.endswith("\n")

    def _say(self, sentence: str) -> None:
        start = "\n" if self._line_open else ""
        self._write(f"{start}{time.strftime('%H:%M:%S')} {sentence}\n")


def command_of(wanted: str | tuple[str, ...], python: str) -> list[str]:
    """Return the command that a setting stands for: `module:function`, or the command itself."""
    return [python, "-m", MODULE, wanted] if isinstance(wanted, str) else list(wanted)


def environment(home: Home) -> dict[str, str]:
    """Return the environment of hooks: modules of the project's root can be imported."""
    paths = [str(home.root.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "NBDURABLE_HOME": str(home.root), "PYTHONPATH": os.pathsep.join(paths)}


def check(home: Home, settings: Settings) -> dict[str, str]:
    """Return what is wrong with hooks of the settings, by kind."""
    import shutil

    wrong: dict[str, str] = {}
    for kind, wanted in settings.hooks.items():
        if not isinstance(wanted, str):
            if not wanted or shutil.which(wanted[0], path=None) is None:
                wrong[kind] = f"there is no command {' '.join(wanted[:1])!r}"
            continue
        done = subprocess.run(
            [*command_of(wanted, sys.executable), "--check"],
            capture_output=True,
            text=True,
            cwd=home.root.parent,
            env=environment(home),
            timeout=settings.hook_timeout_s,
            check=False,
        )
        if done.returncode:
            wrong[kind] = f"{wanted}: {(done.stderr.strip().splitlines() or ['it can not be imported'])[-1]}"
    return wrong


def _too_long(limit_s: float) -> ErrorInfo:
    return ErrorInfo(name="TimeoutError", message=f"it took longer than {limit_s:g} s (hook_timeout_s)")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a hook's process and what it started."""
    if sys.platform == "win32":
        process.kill()
    else:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
