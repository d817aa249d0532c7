"""The pages' process: where it listens, how it is found, and that it ends."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from nbdurable import processes
from nbdurable.dashboard.__main__ import listen
from nbdurable.errors import UsageError
from nbdurable.settings import Home
from tests.tools.processes import until

pytestmark = pytest.mark.timeout(60)


@contextlib.contextmanager
def running(home: Home, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start the pages, and wait until they can be found."""
    child = processes.spawn(
        ["-m", "nbdurable.dashboard", "--home", str(home.root), *words],
        log=home.logs / "dashboard.log",
        cwd=home.root,
    )
    try:
        until(lambda: home.dashboard.exists() or child.poll() is not None, what="the pages are announced")
        yield child
    finally:
        child.kill()
        child.wait()


def get(url: str, path: str) -> int:
    """Return the status of an answer."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


def test_it_is_found_by_its_file_and_ends_when_asked(home: Home) -> None:
    """The file names pid and address from the moment on that it answers; SIGTERM ends it cleanly and removes the file.
    It needs no coordinator, and starts none."""
    with running(home, "--port", "0") as child:
        found = json.loads(home.dashboard.read_text(encoding="utf-8"))
        assert found["pid"] == child.pid
        assert found["url"].startswith("http://127.0.0.1:")
        assert get(found["url"], "/ui") == 401
        child.send_signal(signal.SIGTERM)
        assert child.wait(10) == 0
        assert not home.dashboard.exists()
        assert not home.coordinator.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs os.kill of a parent")
def test_it_ends_with_its_parent(home: Home) -> None:
    """`nbdurable up` that is killed leaves no pages behind."""
    words = [
        sys.executable,
        "-m",
        "nbdurable.dashboard",
        "--home",
        str(home.root),
        "--port",
        "0",
        "--with-parent",
    ]
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess; subprocess.run({words!r})"], cwd=home.root
    )
    try:
        until(home.dashboard.exists, what="the pages are announced")
        pid = json.loads(home.dashboard.read_text(encoding="utf-8"))["pid"]
        assert pid != parent.pid
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    until(
        lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie", what="the pages end"
    )
    assert not home.dashboard.exists()


def test_a_port_in_use_is_passed_over() -> None:
    """The next free one is taken, so that two projects have their pages at the same time."""
    with listen(0) as first:
        port = first.getsockname()[1]
        with listen(port) as second:
            assert port < second.getsockname()[1] < port + 50
            assert second.getsockname()[0] == "127.0.0.1"


def test_no_free_port_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the setting that helps."""
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(listen(0))
        monkeypatch.setattr("nbdurable.dashboard.__main__._PORTS", 1)
        with pytest.raises(UsageError, match="no port") as raised:
            listen(first.getsockname()[1])
        assert "dashboard_port" in raised.value.todo


def test_the_file_of_another_dashboard_is_left_alone(home: Home) -> None:
    """Whoever ends removes only what it wrote itself."""
    with running(home, "--port", "0") as child:
        other = json.dumps({"pid": os.getpid(), "url": "http://127.0.0.1:1"})
        home.dashboard.write_text(other, encoding="utf-8")
        child.send_signal(signal.SIGTERM)
        assert child.wait(10) == 0
        assert home.dashboard.read_text(encoding="utf-8") == other


def test_settings_that_cannot_be_used_are_said(home: Home) -> None:
    """A wrong setting ends the process with its name, and without a traceback."""
    (home.root / "settings.toml").write_text('dashboard_port = "x"', encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, "-m", "nbdurable.dashboard", "--home", str(home.root)],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert ended.returncode == 2
    assert "dashboard_port" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_it_listens_for_this_machine_only() -> None:
    """The pages are bound to the loopback interface."""
    with listen(0) as listener:
        assert listener.family == socket.AF_INET
        assert listener.getsockname()[0] == "127.0.0.1"
