"""The pages in a browser: a project that serves them, runs that are made through the client, tabs that take notes."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import BrowserContext, Page, Request

from nbdurable import contract, processes
from nbdurable.checkpoint import manifest
from nbdurable.checkpoint.blobs import LocalBlobs
from nbdurable.client import Client
from nbdurable.models import Driver, DriverKind, ErrorInfo, Run, Variable, Wait, WaitKind
from nbdurable.security import load_key, load_token
from nbdurable.settings import Home
from tests.tools.processes import until

WIDE = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}


@dataclass
class Drive:
    """An interactive run that this process drives, as a kernel does."""

    client: Client
    run: Run

    def step(self, name: str, *, outputs: Any = (), variables: tuple[Variable, ...] = ()) -> manifest.Blob:
        """Execute a step and commit its checkpoint; return the blob of its outputs."""
        attempt = self.begin(name)
        home = self.client.home
        blobs = LocalBlobs(home.blobs)
        recorded = manifest.put_blob(json.dumps(list(outputs)).encode(), blobs)
        blobs.sync()
        sealed = manifest.seal(
            manifest.Manifest(
                run_id=self.run.id,
                step=name,
                created_at=0.0,
                duration_s=1.0,
                code=manifest.CodeFacts(source="", digest=""),
                variables=variables,
                outputs=recorded,
            ),
            load_key(home),
        )
        self.client.call(
            contract.COMMIT_STEP,
            contract.CommitStep(
                run_id=self.run.id,
                epoch=self.run.epoch,
                step=name,
                attempt=attempt,
                status="completed",
                manifest=sealed,
                variables=variables,
                sentence="1.0 s",
            ),
        )
        return recorded

    def begin(self, name: str, reason: str = "no checkpoint yet") -> int:
        """Begin a step; return its attempt."""
        begin = contract.BeginStep(
            run_id=self.run.id, epoch=self.run.epoch, step=name, action="execute", reason=reason
        )
        return self.client.call(contract.BEGIN_STEP, begin).attempt

    def fail(self, name: str, error: ErrorInfo) -> None:
        """Execute a step that fails."""
        failed = contract.FailStep(
            run_id=self.run.id, epoch=self.run.epoch, step=name, attempt=self.begin(name), error=error
        )
        self.client.call(contract.FAIL_STEP, failed)

    def ask(
        self, title: str, value: Any = None, *, kind: WaitKind = WaitKind.APPROVAL, **fields: Any
    ) -> Wait:
        """Open an approval, or a question."""
        return self.client.call(
            contract.OPEN_WAIT,
            contract.OpenWait(
                run_id=self.run.id,
                epoch=self.run.epoch,
                key=title,
                kind=kind,
                title=title,
                step="review",
                value=value,
                **fields,
            ),
        )

    def answer_of(self, wait: Wait) -> Wait:
        """Return the wait as the coordinator has it now."""
        return self.client.call(contract.GET_WAIT, contract.ReadWait(wait_id=wait.id))


@dataclass
class Project:
    """A project with a coordinator and its pages."""

    client: Client
    url: str

    @property
    def home(self) -> Home:
        return self.client.home

    @property
    def entrance(self) -> str:
        """Return the address with the token, as `nbdurable up` prints it."""
        return f"{self.url}/ui?token={load_token(self.home)}"

    def drive(self, notebook: str, **fields: Any) -> Drive:
        """Create an interactive run."""
        driver = Driver(
            kind=DriverKind.INTERACTIVE, process=processes.identity("kernel"), label=f"kernel {os.getpid()}"
        )
        wanted = contract.CreateRun(notebook=notebook, kind=DriverKind.INTERACTIVE, driver=driver, **fields)
        return Drive(self.client, self.client.call(contract.CREATE_RUN, wanted))


@contextlib.contextmanager
def serve(home: Home) -> Iterator[Project]:
    """Serve the pages of a home by a process of their own, as `nbdurable up` starts it."""
    words = ["-m", "nbdurable.dashboard", "--home", str(home.root), "--port", "0"]
    child = processes.spawn(words, log=home.logs / "dashboard.log", cwd=home.root)
    with Client(home) as client:
        until(lambda: home.dashboard.exists() or child.poll() is not None, what="the pages are announced")
        assert child.poll() is None, processes.tail(home.logs / "dashboard.log")
        client.call(contract.HEALTH, contract.Nothing())
        yield Project(client, json.loads(home.dashboard.read_text(encoding="utf-8"))["url"])
        child.terminate()
        assert child.wait(10) == 0, processes.tail(home.logs / "dashboard.log")
        log = "\n".join(processes.tail(home.logs / "dashboard.log"))
        assert "Traceback" not in log, log


@dataclass
class Tab:
    """A browser tab that writes down what it asked for, and what went wrong in it."""

    page: Page
    shots: Path
    asked: list[Request] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("request", lambda request: self.asked.append(request))
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))

    def shoot(self, name: str) -> None:
        """Keep a picture of the page for people to look at."""
        self.page.screenshot(path=self.shots / f"{name}.png", full_page=True)

    def assert_nothing_left_the_machine(self, url: str) -> None:
        """Every request went to the pages themselves, or was stopped by their policy before it left."""
        ours = (f"{url}/", f"blob:{url}/", "data:")
        outside = [r for r in self.asked if not r.url.startswith(ours)]
        assert [r.url for r in outside if r.failure != "csp"] == []


@contextlib.contextmanager
def let_in(project: Project, context: BrowserContext, shots: Path) -> Iterator[Tab]:
    """Open a tab in a browser that has the cookie."""
    assert context.request.get(project.entrance, max_redirects=0).status == 303
    found = Tab(context.new_page(), shots)
    yield found
    assert found.troubles == []
    found.assert_nothing_left_the_machine(project.url)
