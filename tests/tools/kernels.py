"""A real kernel for tests: started, fed with cells, killed or restarted."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.manager import KernelManager

Output = dict[str, Any]


class Reply:
    """What a cell displayed and how it ended."""

    def __init__(self, status: str, outputs: list[Output], content: dict[str, Any]) -> None:
        self.status, self.outputs, self.content = status, outputs, content

    @property
    def notes(self) -> str:
        """Return nbdurable's own lines."""
        return "\n".join(
            o["data"]["text/plain"] for o in self.outputs if (o.get("metadata") or {}).get("nbdurable")
        )

    @property
    def own(self) -> list[Output]:
        """Return the cell's own outputs, without nbdurable's lines."""
        return [o for o in self.outputs if not (o.get("metadata") or {}).get("nbdurable")]

    @property
    def text(self) -> str:
        """Return what the cell printed."""
        return "".join(o["text"] for o in self.outputs if o["output_type"] == "stream")

    @property
    def error(self) -> str:
        return "\n".join(self.content.get("traceback", []))


class Kernel:
    """A kernel in a folder, as Jupyter would start it for the notebook `path`."""

    def __init__(self, home: Path, path: Path | None, cwd: Path, env: dict[str, str] | None = None) -> None:
        self.env = {**os.environ, "NBDURABLE_HOME": str(home), "PYTHONWARNINGS": "default", **(env or {})}
        if path is not None:
            self.env["JPY_SESSION_NAME"] = str(path)
        self.cwd = cwd
        self.manager = KernelManager(
            kernel_name="python3", transport="ipc", ip=str(cwd / f"k{time.time_ns()}")
        )
        self.client: BlockingKernelClient | None = None
        self._start()

    def _start(self) -> None:
        self.manager.start_kernel(env=self.env, cwd=str(self.cwd))
        self._connect()

    def _connect(self) -> None:
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    @property
    def pid(self) -> int:
        return self.manager.provisioner.pid  # type: ignore[union-attr]

    def restart(self) -> None:
        """Restart as a person does from the menu: the process is replaced at once."""
        assert self.client is not None
        self.client.stop_channels()
        self.manager.restart_kernel(now=True)
        self._connect()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def interrupt(self) -> None:
        self.manager.interrupt_kernel()

    def send(self, code: str, cell_id: str | None = None) -> str:
        """Send a cell without waiting for it."""
        assert self.client is not None
        content = {
            "code": code,
            "silent": False,
            "store_history": True,
            "user_expressions": {},
            "allow_stdin": False,
            "stop_on_error": True,
        }
        message = self.client.session.msg("execute_request", content)
        if cell_id is not None:
            message["metadata"]["cellId"] = cell_id
        self.client.shell_channel.send(message)
        return message["header"]["msg_id"]

    def collect(self, msg_id: str, timeout: float = 60) -> Reply:
        """Wait for a cell's reply and outputs."""
        assert self.client is not None
        outputs: list[Output] = []
        deadline = time.monotonic() + timeout
        while True:
            message = self.client.get_iopub_msg(timeout=max(0.1, deadline - time.monotonic()))
            if message["parent_header"].get("msg_id") != msg_id:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "status" and content["execution_state"] == "idle":
                break
            if kind == "stream":
                if outputs and outputs[-1].get("name") == content["name"]:
                    outputs[-1]["text"] += content["text"]
                else:
                    outputs.append({"output_type": "stream", **content})
            elif kind in ("display_data", "execute_result"):
                outputs.append({"output_type": kind, **content})
            elif kind == "update_display_data":
                wanted = content["transient"]["display_id"]
                for output in outputs:
                    if (output.get("transient") or {}).get("display_id") == wanted:
                        output.update(data=content["data"], metadata=content["metadata"])
        while True:
            reply = self.client.get_shell_msg(timeout=max(0.1, deadline - time.monotonic()))
            if reply["parent_header"].get("msg_id") == msg_id:
                return Reply(reply["content"]["status"], outputs, reply["content"])

    def run(self, code: str, cell_id: str | None = None, timeout: float = 60) -> Reply:
        """Run a cell and wait for its end."""
        return self.collect(self.send(code, cell_id), timeout)

    def value(self, expression: str) -> str:
        """Return the repr of an expression, without a trace in the history."""
        assert self.client is not None
        reply = self.client.execute_interactive(
            "", silent=True, user_expressions={"v": expression}, timeout=30, output_hook=lambda m: None
        )
        found = reply["content"]["user_expressions"]["v"]
        return (
            found["data"]["text/plain"] if found["status"] == "ok" else f"{found['ename']}: {found['evalue']}"
        )

    def shutdown(self) -> None:
        if self.client is not None:
            self.client.stop_channels()
        if self.manager.has_kernel:
            self.manager.shutdown_kernel(now=True)
        self.manager.cleanup_resources()
