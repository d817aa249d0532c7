"""The pages as Panel sees them: one live component per browser tab, a look at the coordinator each second.

Owns what each page asks of the coordinator and what its buttons do. Draws through `view`, talks only through
the client; a page holds nothing that the coordinator does not know, but what was just said to its reader.
"""

from __future__ import annotations

import asyncio
import getpass
import logging
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import panel as pn
import param
from panel.custom import JSComponent

from nbdurable import contract
from nbdurable.client import Client
from nbdurable.contract import AnswerWait, ByRun, ListRuns, ListWaits, ReadEvents, ReadWait
from nbdurable.dashboard import forms, view
from nbdurable.dashboard.guard import nonce
from nbdurable.errors import CoordinatorError, DurableError
from nbdurable.models import Call, Event, RunDetail, RunStatus, Wait, WaitKind, WaitStatus

LOOK_MS = 700
MAX_RUNS = 100
MAX_APPROVALS = 50
MAX_EVENTS = 300
MAX_CALLS = 200  # newest ones that a run's page lists
_EVENTS_AT_ONCE = 1000

_log = logging.getLogger(__name__)


class Live(JSComponent):  # type: ignore[misc]
    """The browser's half of a page (`static/live.js`): shows HTML, and says what was clicked.

    `shown` is [version, HTML]. `beat` is [count, version] and moves with each look, so that the browser knows
    that it is heard, and which version it should have: Panel loses changes that are made while a page is
    opened, and the browser then asks for them ("look").
    """

    shown = param.List(default=[0, ""])
    beat = param.List(default=[0, 0])

    _esm = Path(__file__).parent / "static" / "live.js"

    def __init__(self, on_click: Callable[[Mapping[str, Any]], Any]) -> None:
        super().__init__()
        self._on_click = on_click

    async def _handle_msg(self, data: Any) -> None:
        if isinstance(data, Mapping):
            await self._on_click(data)

    def show(self, html: str, *, again: bool = False) -> None:
        """Show HTML where it differs from what is shown, or `again`."""
        version, before = self.shown
        if again or html != before:
            version += 1
            self.shown = [version, html]
        self.beat = [self.beat[0] + 1, version]


@dataclass(frozen=True)
class Said:
    """What a page tells its reader about a click; the number tells two equal sentences apart."""

    number: int
    text: str
    todo: str = ""
    tone: str = ""


class Memory:
    """Runs that a page asked for before, shared by all pages: a run that nobody drives stays as it is."""

    def __init__(self, client: Client, most: int = 2000) -> None:
        self._client = client
        self._most = most
        self._notebooks: OrderedDict[str, str] = OrderedDict()
        self._progress: OrderedDict[tuple[str, str, float], Mapping[str, int | None]] = OrderedDict()

    def notebook(self, run_id: str) -> str:
        """Return the notebook of a run."""
        if run_id not in self._notebooks:
            self._keep(
                self._notebooks, run_id, self._client.call(contract.GET_RUN, ByRun(run_id=run_id)).notebook
            )
        return self._notebooks[run_id]

    def progress(self, run_id: str, status: RunStatus, updated_at: float) -> Mapping[str, int | None]:
        """Return how far a run's steps are."""
        key = (run_id, status.value, updated_at)
        if (known := self._progress.get(key)) is not None:
            return known
        run = self._client.call(contract.GET_RUN, ByRun(run_id=run_id))
        found = view.progress(run.steps, run.steps_total)
        if status is not RunStatus.RUNNING:
            self._keep(self._progress, key, found)
        return found

    def _keep(self, memory: OrderedDict[Any, Any], key: Any, value: Any) -> None:
        memory[key] = value
        while len(memory) > self._most:
            memory.popitem(last=False)


class Page:
    """One page in one browser tab.

    `draw` and `act` may block: they are called in a thread, one at a time.
    """

    here: ClassVar[str] = ""
    root: ClassVar[str] = ""  # from this page's address to the pages' root, so that they work behind a proxy
    heading: ClassVar[str] = ""

    def __init__(self, client: Client, memory: Memory) -> None:
        self.client = client
        self.memory = memory
        self.said: Said | None = None
        self._lock = asyncio.Lock()
        self._last: tuple[str, dict[str, Any], Said | None] | None = None
        self._html_of_last = ""
        self.live = Live(self._clicked)

    # What each page is

    def draw(self) -> tuple[str, dict[str, Any]]:
        """Ask the coordinator; return a template and its values."""
        raise NotImplementedError

    def act(self, do: str, subject: str, comment: str, by: str, form: Mapping[str, Any]) -> str:
        """Do what a button says; return the sentence for its reader. `form`: what was entered beside it."""
        raise NotImplementedError

    # What all have in common

    def template(self) -> pn.Template:
        """Return the page as Panel serves it, with a first look that holds no data yet."""
        first = self._render("loading.html", {"open_approvals": 0}, away=None)
        template = pn.Template((view.FOLDER / "templates" / "page.html").read_text(encoding="utf-8"))
        template.add_panel("live", self.live)
        for name, value in {
            "root": self.root,
            "heading": self.heading,
            "nonce": nonce.get(),
            "first": first,
        }.items():
            template.add_variable(name, value)
        pn.state.add_periodic_callback(self.look, period=LOOK_MS)
        return template

    async def look(self) -> None:
        """Show the present state, where it differs from what is shown."""
        if self._lock.locked():
            return  # the last look still waits for its answer
        async with self._lock:
            html = await asyncio.to_thread(self._html)
        self.live.show(html)

    async def _clicked(self, message: Mapping[str, Any]) -> None:
        do, subject, comment, by = (str(message.get(name, "")) for name in ("do", "id", "comment", "by"))
        form = message.get("form")
        async with self._lock:
            if do != "look":
                said = await asyncio.to_thread(
                    self._act,
                    do,
                    subject,
                    comment[:4000],
                    by[:200],
                    form if isinstance(form, Mapping) else {},
                )
                self.said = Said((self.said.number if self.said else 0) + 1, *said)
            html = await asyncio.to_thread(self._html)
        self.live.show(html, again=do == "look")

    def _act(
        self, do: str, subject: str, comment: str, by: str, form: Mapping[str, Any]
    ) -> tuple[str, str, str]:
        try:
            return self.act(do, subject, comment, by, form), "", ""
        except CoordinatorError as error:
            return error.message, "Whether that was done is seen here when the coordinator is back.", "bad"
        except DurableError as error:
            return error.message, error.todo, "bad"
        except Exception:
            _log.exception("a button failed: %s %s", do, subject)
            return "That failed.", "The dashboard's log says why (.nbdurable/logs).", "bad"

    def _html(self) -> str:
        """Return the page; where the coordinator is out of reach, the last one with a line that says so."""
        try:
            template, values = self.draw()
            if (template, values, self.said) != self._last:
                self._html_of_last = self._render(template, values, away=None)
                self._last = template, values, self.said
            return self._html_of_last
        except CoordinatorError as error:
            template, values, _ = self._last or ("loading.html", {"open_approvals": 0}, None)
            return self._render(template, values, away=error.message)
        except DurableError as error:
            values = {"message": error.message, "todo": error.todo, "open_approvals": 0}
            return self._render("trouble.html", values, away=None)
        except Exception:
            _log.exception("the page %s failed", type(self).__name__)
            values = {
                "message": "This page failed",
                "todo": "The dashboard's log says why (.nbdurable/logs).",
                "open_approvals": 0,
            }
            return self._render("trouble.html", values, away=None)

    def _render(self, template: str, values: dict[str, Any], *, away: str | None) -> str:
        common = {
            "root": self.root,
            "here": self.here,
            "heading": self.heading,
            "said": self.said,
            "away": away,
        }
        return view.render(template, **{**values, **common})

    def _open_approvals(self) -> tuple[Wait, ...]:
        asked = (
            self.client.call(contract.LIST_WAITS, ListWaits(kind=kind, status=WaitStatus.OPEN)).waits
            for kind in (WaitKind.APPROVAL, WaitKind.QUESTION)
        )
        return tuple(sorted((wait for waits in asked for wait in waits), key=lambda wait: wait.created_at))

    def _decide(self, do: str, wait_id: str, comment: str, by: str, form: Mapping[str, Any]) -> str:
        """Answer an approval or a question, as the person who uses this machine unless a reviewer was chosen."""
        wait = self.client.call(contract.GET_WAIT, ReadWait(wait_id=wait_id))
        approved = do == "approve"
        value = forms.entered(wait, form) if approved and wait.form is not None else wait.value
        edited = wait.kind is WaitKind.QUESTION or value != wait.value
        wait = self.client.call(
            contract.ANSWER_WAIT,
            AnswerWait(
                wait_id=wait_id,
                approved=approved,
                value=value if approved and edited else None,
                edited=approved and edited,
                by=f"{by} (dashboard)" if by else _who(),
                comment=comment.strip(),
                nonce=uuid.uuid4().hex,
            ),
        )
        if wait.kind is WaitKind.QUESTION:
            return f"{'Answered' if approved else 'Refused'}: {wait.title}"
        return f"{'Approved' if approved else 'Rejected'}: {wait.title}"


class RunsPage(Page):
    """All runs, newest first; `?status=` shows those of one status."""

    here, root, heading = "runs", "", "Runs"

    def __init__(self, client: Client, memory: Memory, status: str) -> None:
        super().__init__(client, memory)
        self._status = RunStatus(status) if status in list(RunStatus) else None

    def draw(self) -> tuple[str, dict[str, Any]]:
        found = self.client.call(contract.LIST_RUNS, ListRuns(status=self._status, limit=MAX_RUNS + 1)).runs
        rows = [
            {"run": run, "progress": self.memory.progress(run.id, run.status, run.updated_at)}
            for run in found[:MAX_RUNS]
        ]
        return "runs.html", {
            "rows": rows,
            "more": len(found) > MAX_RUNS,
            "status": self._status,
            "open_approvals": len(self._open_approvals()),
        }


class RunPage(Page):
    """One run: what it did, why, and what it left."""

    here, root, heading = "runs", "../../", "Run"

    def __init__(self, client: Client, memory: Memory, run_id: str) -> None:
        super().__init__(client, memory)
        self._run_id = run_id
        self._run: RunDetail | None = None
        self._seq = 0
        self._count = 0
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._calls: list[Call] = []

    def draw(self) -> tuple[str, dict[str, Any]]:
        news = self._read_events()
        if news or self._run is None:
            self._run = self.client.call(contract.GET_RUN, ByRun(run_id=self._run_id))
            wanted = contract.ReadCalls(run_id=self._run_id, limit=MAX_CALLS)
            self._calls = [one.call for one in self.client.call(contract.READ_CALLS, wanted).calls]
        run = self._run
        return "run.html", {
            "run": run,
            "progress": view.progress(run.steps, run.steps_total),
            "choices": view.choices(run),
            "error": view.own_error(run),
            "calls": self._calls,
            "open_waits": [wait for wait in run.waits if wait.status is WaitStatus.OPEN],
            "events": list(self._events),
            "earlier": self._count - len(self._events),
            "open_approvals": len(self._open_approvals()),
        }

    def act(self, do: str, subject: str, comment: str, by: str, form: Mapping[str, Any]) -> str:
        match do:
            case "cancel":
                run = self.client.call(contract.CANCEL_RUN, ByRun(run_id=subject))
                said = "The run is cancelled." if run.status.is_final else "The run was asked to stop."
            case "resume":
                self.client.call(contract.RESUME_RUN, contract.ResumeRun(run_id=subject))
                said = "The run is queued; a worker takes it up."
            case _:
                raise ValueError(do)
        self._run = None
        return said

    def _read_events(self) -> bool:
        """Read what happened since the last look; tell whether anything did, or the run's row changed."""
        before = self._seq
        while True:
            wanted = ReadEvents(run_id=self._run_id, after=self._seq, limit=_EVENTS_AT_ONCE)
            page = self.client.call(contract.READ_EVENTS, wanted)
            if page.events:
                self._events.extend(page.events)
                self._count += len(page.events)
                self._seq = page.events[-1].seq
            if len(page.events) < _EVENTS_AT_ONCE:
                known = self._run
                return self._seq != before or known is None or page.run.updated_at != known.updated_at


class ApprovalsPage(Page):
    """The inbox: what waits for a person. What is answered while one looks stays, with who answered."""

    here, root, heading = "approvals", "../", "Approvals"

    def __init__(self, client: Client, memory: Memory) -> None:
        super().__init__(client, memory)
        self._shown: dict[str, Wait] = {}

    def draw(self) -> tuple[str, dict[str, Any]]:
        waiting = self._open_approvals()
        open_now = {wait.id: wait for wait in waiting[:MAX_APPROVALS]}
        for wait_id, wait in self._shown.items():
            if wait.status is WaitStatus.OPEN and wait_id not in open_now:
                self._shown[wait_id] = self.client.call(contract.GET_WAIT, ReadWait(wait_id=wait_id))
        self._shown |= open_now
        return "approvals.html", {
            "items": [
                {"wait": wait, "notebook": self.memory.notebook(wait.run_id)} for wait in self._shown.values()
            ],
            "more": len(waiting) - len(open_now),
            "open_approvals": len(waiting),
        }

    def act(self, do: str, subject: str, comment: str, by: str, form: Mapping[str, Any]) -> str:
        return self._decide(do, subject, comment, by, form)


class ApprovalPage(Page):
    """One approval, as a card in a notebook links it."""

    here, root, heading = "approvals", "../../", "Approval"

    def __init__(self, client: Client, memory: Memory, wait_id: str) -> None:
        super().__init__(client, memory)
        self._wait_id = wait_id.upper()

    def draw(self) -> tuple[str, dict[str, Any]]:
        wait = self.client.call(contract.GET_WAIT, ReadWait(wait_id=self._wait_id))
        return "approval.html", {
            "wait": wait,
            "notebook": self.memory.notebook(wait.run_id),
            "open_approvals": len(self._open_approvals()),
        }

    def act(self, do: str, subject: str, comment: str, by: str, form: Mapping[str, Any]) -> str:
        return self._decide(do, subject, comment, by, form)


def _who() -> str:
    try:
        return f"{getpass.getuser()} (dashboard)"
    except (KeyError, OSError):  # a user id without a name
        return "dashboard"


def applications(client: Client) -> dict[str, Callable[[], pn.Template]]:
    """Return the pages by address; each call makes one for a new browser tab."""
    memory = Memory(client)

    def argument(name: str) -> str:
        values = pn.state.session_args.get(name) or [b""]
        return bytes(values[0]).decode("utf-8", "replace")

    def routed(name: str) -> str:
        return str((pn.state.route_params or {}).get(name, ""))

    return {
        "/ui": lambda: RunsPage(client, memory, argument("status")).template(),
        "/ui/runs/{run_id}": lambda: RunPage(client, memory, routed("run_id")).template(),
        "/ui/approvals": lambda: ApprovalsPage(client, memory).template(),
        "/ui/approvals/{wait_id}": lambda: ApprovalPage(client, memory, routed("wait_id")).template(),
    }
