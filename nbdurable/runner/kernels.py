"""The kernel of a headless run: out of reach of other users, ended from any thread, and gone at the end.

Owns jupyter_client's manager and the kernel's process; knows nothing of cells, runs or the coordinator.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jupyter_client.asynchronous import AsyncKernelClient
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync

from nbdurable import processes
from nbdurable.models import ProcessIdentity

_MAX_SOCKET_PATH_BYTES = 100


class CellClient(AsyncKernelClient):  # type: ignore[misc]
    """A kernel client that says which cell it sends, as Jupyter's front ends do."""

    cell_id: str | None = None

    def execute(self, code: str, silent: bool = False, store_history: bool = True, **options: Any) -> str:
        """Send code with the id of its cell in the message's metadata; return the message's id."""
        content = {
            "code": code,
            "silent": silent,
            "store_history": store_history,
            "user_expressions": options.get("user_expressions") or {},
            "allow_stdin": False,
            "stop_on_error": options.get("stop_on_error", True),
        }
        metadata = {} if self.cell_id is None else {"cellId": self.cell_id}
        message = self.session.msg("execute_request", content, metadata=metadata)
        self.shell_channel.send(message)
        return str(message["header"]["msg_id"])


class Kernel:
    """One kernel process. `environment` is added to this process's own.

    `label` names what has one kernel at a time: what a killed process left for an earlier one is removed.
    """

    def __init__(
        self,
        name: str,
        *,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        label: str | None = None,
        on_start: Callable[[], None] | None = None,
    ) -> None:
        self.cwd = cwd
        self.environment = dict(environment or {})
        self.process: ProcessIdentity | None = None
        self._on_start = on_start
        self._popen: Any = None
        self._folder = _own_folder(label)
        self.manager = self._manager(name)

    def _manager(self, name: str) -> Any:
        manager = AsyncKernelManager(
            kernel_name=name, connection_file=str(self._folder / "kernel.json"), autorestart=False
        )
        manager.client_factory = CellClient
        socket = self._folder / "k"
        if sys.platform != "win32" and len(os.fsencode(f"{socket}-9")) <= _MAX_SOCKET_PATH_BYTES:
            manager.transport, manager.ip = "ipc", str(socket)
        elif manager.has_trait("transport_encryption"):
            manager.transport_encryption = "auto"
        return manager

    def start(self) -> None:
        """Start the process, if that was not done; it is ready when a client's `wait_for_ready` returns."""
        if self._popen is None:
            run_sync(self.manager.start_kernel)(**self._options())
            self._popen = self.manager.provisioner.process
            with contextlib.suppress(ProcessLookupError):  # dead already: the first message will tell
                self.process = processes.identity("kernel", self._popen.pid)
            if self._on_start is not None:
                self._on_start()

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"env": {**os.environ, **self.environment}}
        if self.manager.ipykernel:
            options["extra_arguments"] = ["--HistoryManager.hist_file=:memory:"]
        if self.cwd is not None:
            options["cwd"] = str(self.cwd)
        return options

    @property
    def exit_status(self) -> int | None:
        """Return the exit status, negative for a signal; None while it lives or before its start."""
        return None if self._popen is None else self._popen.poll()

    def interrupt(self) -> None:
        """Interrupt what the kernel runs, as Ctrl-C would; from any thread."""
        if self._popen is None or self._popen.poll() is not None:
            return
        if sys.platform == "win32":
            from jupyter_client.win_interrupt import send_interrupt

            send_interrupt(self._popen.win32_interrupt_event)
        else:
            self._signal_group(signal.SIGINT)

    def kill(self) -> None:
        """Kill the kernel and its children at once; from any thread."""
        if self.process is not None:
            processes.end_tree(self.process, grace_s=0.0)
        if self._popen is not None and sys.platform != "win32":
            self._signal_group(signal.SIGKILL)  # children that outlived it

    def _signal_group(self, number: int) -> None:
        """Signal the process group that the kernel leads: itself, and what it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, number)

    def end(self, *, graceful: bool = True) -> None:
        """Shut the kernel down: when it returns, the process and its children are gone."""
        try:
            if graceful and self.exit_status is None and self.manager.has_kernel:
                with contextlib.suppress(Exception):  # whatever it answers, it is killed next
                    run_sync(self.manager.shutdown_kernel)()
            self.kill()
            if self._popen is not None:
                with contextlib.suppress(Exception):
                    self._popen.wait(timeout=5)
            with contextlib.suppress(Exception):
                run_sync(self.manager.cleanup_resources)()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)


def _own_folder(label: str | None) -> Path:
    """Make a private folder for a kernel's sockets, and remove those that were left under this label."""
    if label is None:
        return Path(tempfile.mkdtemp(prefix="nbdurable-"))
    prefix = f"nbdurable-{label}-"
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        if not hasattr(os, "getuid") or left.lstat().st_uid == os.getuid():
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=prefix))
