"""Runs that a notebook starts, and waits for: `trigger` and its kin.

Owns the public functions, the handle of a run, and what a child's end means to the notebook. Which run a repeated
statement means is decided by the coordinator, from the call's name that is made here. In a script, outside of any run,
the same functions start runs that have no parent.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from nbdurable import contract, notebooks
from nbdurable.checkpoint.blobs import LocalBlobs
from nbdurable.checkpoint.plan import digest
from nbdurable.client import Client
from nbdurable.contract import CreateRun, WaitSpec
from nbdurable.errors import ChildFailed, UsageError, WaitTimeout
from nbdurable.kernel import display, extension, recorded
from nbdurable.kernel.forms import Form
from nbdurable.kernel.gates import Gate, Steps, Unopened, counted, drive, drive_async
from nbdurable.kernel.session import Session, current
from nbdurable.kernel.waits import When, deadline
from nbdurable.lifecycle import outcome
from nbdurable.models import DriverKind, Run, RunStatus, WaitAnswer, WaitKind
from nbdurable.security import load_key
from nbdurable.settings import Home, Settings, find_home
from nbdurable.telemetry import fault_point

Scope = Literal["run", "global"]
OnError = Literal["stop", "collect"] | int
Write = Callable[[notebooks.Prepared], str]
_counting = threading.Lock()


@dataclass(frozen=True)
class RunHandle:
    """A run that was started: its id, its notebook, and what becomes of it. It may be kept in a variable of a step."""

    id: str
    notebook: str
    home: str = field(repr=False)

    @property
    def short(self) -> str:
        """Return the eight digits that people type."""
        return self.id[-8:]

    @property
    def status(self) -> RunStatus:
        """Return the run's status as it is now."""
        return self._run().status

    @property
    def url(self) -> str:
        """Return the address of the run's page, which `nbdurable up` serves."""
        home = Home(Path(self.home))
        return f"{display.pages(home, Settings.load(home))}/ui/runs/{self.id}"

    def result(self, *, returns: Any = None) -> Any:
        """Return what the completed run said with `durable.result`, as `returns` has it.

        Raises ChildFailed for a run that ended otherwise, UsageError for one that has not ended.
        """
        run = self._run()
        if not run.status.is_final:
            raise UsageError(
                f"run {run.short} of {Path(run.notebook).name} is {run.status}: it has no result yet",
                todo="`handle.wait()` waits for it",
            )
        return _result(run.id, run.notebook, Form.of(returns), outcome(run, 0.0))

    def wait(self, *, timeout: When | None = None, returns: Any = None) -> Any:
        """Wait for the run's end, and return its result; see `trigger_and_wait`."""
        if current() is None:
            return self._follow(timeout, returns)
        return drive(_one(self._waited(timeout, returns)))

    async def wait_async(self, *, timeout: When | None = None, returns: Any = None) -> Any:
        """Wait for the run's end; other tasks of the cell go on meanwhile. See `wait`."""
        if current() is None:
            return await asyncio.to_thread(self._follow, timeout, returns)
        return await drive_async(_one(self._waited(timeout, returns)))

    def _waited(self, timeout: When | None, returns: Any) -> Unopened:
        title = Path(self.notebook).name
        spec = WaitSpec(kind=WaitKind.CHILD, title=title, child=self.id, **deadline(timeout, title))
        return Unopened(spec, f"run:{self.id}", partial(_result, self.id, self.notebook, Form.of(returns)))

    def _follow(self, timeout: When | None, returns: Any) -> Any:
        """Wait in a script, which nothing suspends."""
        ends_at = deadline(timeout, Path(self.notebook).name)
        until = ends_at.get("deadline_at", time.time() + ends_at.get("deadline_in_s", float("inf")))
        client, after = self._client(), 1 << 60
        while True:
            hold_s = max(0.0, min(contract.HOLD_S, until - time.time()))
            question = contract.ReadEvents(run_id=self.id, after=after, hold_s=hold_s)
            run = client.call(contract.READ_EVENTS, question).run
            if run.status.is_final:
                return _result(run.id, run.notebook, Form.of(returns), outcome(run, 0.0))
            if time.time() >= until:
                raise WaitTimeout(f"run {run.short} is still {run.status}", todo="it goes on by itself")

    def _run(self) -> Run:
        return self._client().call(contract.GET_RUN, contract.ByRun(run_id=self.id))

    def _client(self) -> Client:
        session = current()
        if session is not None and str(session.home.root) == self.home:
            return session.client
        return Client(Home(Path(self.home)))


@dataclass(frozen=True)
class Child:
    """A run that is not started yet, as `child` describes it: for `trigger_batch`, `first_of` and `all_of`."""

    notebook: Path
    options: Mapping[str, Any]
    returns: Form | None = None
    timeout: When | None = None

    def unopened(self) -> Unopened:
        """Return the wait for its end, which starts it when it is opened."""
        session = current()
        if session is None:
            raise UsageError(
                "there is no run here that could wait",
                todo="in a script, `durable.trigger(…).wait()` waits for a run",
            )
        begins = self.options["begins"]
        if begins["debounce_s"] is not None or begins["singleton"] is not None:
            raise UsageError(
                f"{self.notebook.name} can't be debounced, or a singleton, and be waited for by the same words",
                todo="`durable.trigger(…, debounce=…).wait()` waits for whichever run that is",
            )
        blobs = session.blobs
        asked, call = self._asked(lambda prepared: blobs.put(prepared.snapshot), session)
        blobs.sync()
        title = self.notebook.name
        spec = WaitSpec(
            kind=WaitKind.CHILD,
            title=title,
            start=asked.model_copy(update={"call": call}),
            **deadline(self.timeout, title),
        )
        return Unopened(spec, f"start:{call}", partial(_result, "", str(self.notebook), self.returns))

    def _asked(
        self, write: Callable[[notebooks.Prepared], str], session: Session | None
    ) -> tuple[CreateRun, str | None]:
        """Return the question that starts it, and the name of the call that does."""
        options = dict(self.options)
        more = {name: options.pop(name) for name in ("key_scope", "cancel_with_parent")} | options.pop(
            "begins"
        )
        try:
            question, _ = notebooks.request(write, self.notebook, **options)
        except UsageError:
            if not _comes_back():
                raise
            question = CreateRun(
                notebook=str(self.notebook), kind=DriverKind.HEADLESS
            )  # it was started before
        if session is None:
            return question.model_copy(update=more | {"key_scope": "global"}), None
        given = json.dumps(notebooks.plain(options["parameters"]), sort_keys=True)
        call = _call(digest(str(self.notebook), given, options["idempotency_key"] or ""))
        return question.model_copy(update=more | {"call": call}), call


def child(
    notebook: str | Path,
    params: Mapping[str, Any] | BaseModel | None = None,
    *,
    returns: Any = None,
    timeout: When | None = None,
    idempotency_key: str | None = None,
    key_scope: Scope = "run",
    key_ttl: str | float | timedelta = contract.KEY_LIFE_S,
    tags: Iterable[str] = (),
    retries: int = 0,
    run_timeout: str | float | timedelta | None = None,
    delay: str | float | timedelta = 0.0,
    ttl: str | float | timedelta | None = None,
    debounce: str | float | timedelta | None = None,
    debounce_key: str | None = None,
    debounce_mode: Literal["leading", "trailing"] = "leading",
    debounce_max: str | float | timedelta | None = None,
    singleton: Literal["skip", "cancel", "queue"] | None = None,
    singleton_key: str | None = None,
    cancel_with_parent: bool = False,
) -> Child:
    """Describe a run for `trigger_batch`, `first_of` and `all_of`; the arguments are those of `trigger_and_wait`."""
    if key_scope not in ("run", "global"):
        raise UsageError(f"key_scope={key_scope!r} is not known", todo="use 'run' or 'global'")
    begins = notebooks.conditions(
        key_ttl=key_ttl,
        debounce=debounce,
        debounce_key=debounce_key,
        debounce_mode=debounce_mode,
        debounce_max=debounce_max,
        singleton=singleton,
        singleton_key=singleton_key,
    )
    if isinstance(tags, str):
        raise UsageError(f"tags={tags!r} is one text", todo=f"give a list: tags=[{tags!r}]")
    session = current()
    path = Path(notebook).expanduser()
    if not path.is_absolute():
        path = (session.notebook.parent if session is not None else Path.cwd()) / path
    options = {
        "parameters": params.model_dump(mode="json") if isinstance(params, BaseModel) else dict(params or {}),
        "tags": tuple(tags),
        "idempotency_key": idempotency_key,
        "key_scope": key_scope,
        "begins": begins,
        "retries": retries,
        "timeout": run_timeout,
        "delay": delay,
        "ttl": ttl,
        "cancel_with_parent": cancel_with_parent,
    }
    return Child(path, options, Form.of(returns), timeout)


def trigger(
    notebook: str | Path,
    params: Mapping[str, Any] | BaseModel | None = None,
    *,
    idempotency_key: str | None = None,
    key_scope: Scope = "run",
    key_ttl: str | float | timedelta = contract.KEY_LIFE_S,
    tags: Iterable[str] = (),
    retries: int = 0,
    run_timeout: str | float | timedelta | None = None,
    delay: str | float | timedelta = 0.0,
    ttl: str | float | timedelta | None = None,
    debounce: str | float | timedelta | None = None,
    debounce_key: str | None = None,
    debounce_mode: Literal["leading", "trailing"] = "leading",
    debounce_max: str | float | timedelta | None = None,
    singleton: Literal["skip", "cancel", "queue"] | None = None,
    singleton_key: str | None = None,
    cancel_with_parent: bool = False,
) -> RunHandle:
    """Start a headless run of a notebook as it is now, as a child of this run; it goes on by itself.

    `notebook`: a path, from this notebook's folder. `params`: values for its cell tagged `parameters`, or a pydantic
    model; checked as `nbdurable run` checks them. A statement that is repeated (a retry, a crash, a resumed or edited
    cell) starts its child once: it is known by step, notebook, parameters and how many equal ones came before it in
    the attempt. `%durable rerun STEP` starts it again, and so does an edit of the child's notebook after it failed.

    `idempotency_key`: what tells runs apart instead. The run that was first started with it is returned for `key_ttl`
    (30 days), unless that failed or was cancelled; `key_scope`: "run" among the children of this run, "global" among
    all runs of the project.

    `debounce="30s"`, by `debounce_key`: the run begins when nobody has asked for it so long, or `debounce_max` after it
    was first asked for; the parameters of the first ("leading") or of the newest ("trailing") asker count. `singleton`,
    by notebook or `singleton_key`: while another run of the kind is open, "skip" returns that one, "cancel" cancels it
    first, "queue" waits for its end. `retries`, `run_timeout`, `delay` and `ttl` are those of `nbdurable run`.
    Cancelling a run cancels its children. If it fails they go on, unless `cancel_with_parent`. In a script the run
    has no parent. Raises NotebookError, StepUsageError or ParameterError for what can't be run, before anything is
    started.
    """
    one = child(
        notebook,
        params,
        idempotency_key=idempotency_key,
        key_scope=key_scope,
        key_ttl=key_ttl,
        tags=tags,
        retries=retries,
        run_timeout=run_timeout,
        delay=delay,
        ttl=ttl,
        debounce=debounce,
        debounce_key=debounce_key,
        debounce_mode=debounce_mode,
        debounce_max=debounce_max,
        singleton=singleton,
        singleton_key=singleton_key,
        cancel_with_parent=cancel_with_parent,
    )
    return trigger_batch([one])[0]


async def trigger_async(notebook: str | Path, *args: Any, **options: Any) -> RunHandle:
    """Start a headless run of a notebook; other tasks of the cell go on meanwhile. See `trigger`."""
    one = child(notebook, *args, **options)
    return (await trigger_batch_async([one]))[0]


def trigger_batch(children: Sequence[Child]) -> list[RunHandle]:
    """Start up to 1,000 runs, in one transaction: all of them, or none.

    handles = durable.trigger_batch([durable.child("report.ipynb", {"city": city}) for city in cities])
    """
    return _batch(children)()


async def trigger_batch_async(children: Sequence[Child]) -> list[RunHandle]:
    """Start up to 1,000 runs in one transaction; other tasks of the cell go on meanwhile. See `trigger_batch`."""
    return await asyncio.to_thread(_batch(children))


def _batch(children: Sequence[Child]) -> Callable[[], list[RunHandle]]:
    """Return what starts runs; the calls are named, in order, before it is called."""
    _check_batch(children)
    session = current()
    home = session.home if session is not None else find_home(children[0].notebook)
    blobs = session.blobs if session is not None else LocalBlobs(home.blobs)

    def write(prepared: notebooks.Prepared) -> str:
        load_key(home.create())  # refused before anything is written where the store is not trusted
        return blobs.put(prepared.snapshot)

    asked = tuple(one._asked(write, session)[0] for one in children)

    def start() -> list[RunHandle]:
        blobs.sync()
        if session is None:
            runs = Client(home).call(contract.CREATE_RUNS, contract.CreateRuns(runs=asked)).runs
        else:
            question = contract.StartChildren(
                run_id=session.run_id, epoch=session.epoch, step=_step(), children=asked
            )
            runs = session.client.call(contract.START_CHILDREN, question).runs
            fault_point("children-started")
        for run, question_ in zip(runs, asked, strict=True):
            if session is not None and (said := notebooks.other_than_asked(run, question_)):
                display.say(session.shell, said)
        return [RunHandle(run.id, run.notebook, str(home.root)) for run in runs]

    return start


def _check_batch(children: Sequence[Child]) -> None:
    if not 0 < len(children) <= contract.MAX_CHILDREN:
        raise UsageError(
            f"{len(children):,} runs can't be started at once",
            todo=f"start 1 to {contract.MAX_CHILDREN:,} at a time; nothing was started",
        )
    wrong = next((one for one in children if not isinstance(one, Child)), None)
    if wrong is not None:
        raise UsageError(
            f"{wrong!r} is no run that could be started",
            todo="durable.child('report.ipynb', {'city': 'Bern'})",
        )


def trigger_and_wait(
    notebook: str | Path,
    params: Mapping[str, Any] | BaseModel | None = None,
    *,
    returns: Any = None,
    timeout: When | None = None,
    idempotency_key: str | None = None,
    key_scope: Scope = "run",
    key_ttl: str | float | timedelta = contract.KEY_LIFE_S,
    tags: Iterable[str] = (),
    retries: int = 0,
    run_timeout: str | float | timedelta | None = None,
    delay: str | float | timedelta = 0.0,
    ttl: str | float | timedelta | None = None,
    cancel_with_parent: bool = False,
) -> Any:
    """Start a run as `trigger` does, wait for its end, and return its result (what it said with `durable.result`).

    Headless, this run is suspended meanwhile and holds no kernel. `returns`: a pydantic model, or another type, that
    the result is made into; UsageError says what does not fit. A run that does not complete raises `ChildFailed`, with
    its id and its error; once it was resumed, this step waits for its new end when it runs again. After `timeout`
    WaitTimeout is raised, and the child goes on.

        report = durable.trigger_and_wait("report.ipynb", {"city": "Bern"}, returns=Report)
    """
    one = child(
        notebook,
        params,
        returns=returns,
        timeout=timeout,
        idempotency_key=idempotency_key,
        key_scope=key_scope,
        key_ttl=key_ttl,
        tags=tags,
        retries=retries,
        run_timeout=run_timeout,
        delay=delay,
        ttl=ttl,
        cancel_with_parent=cancel_with_parent,
    )
    return drive(_one(one.unopened()))


async def trigger_and_wait_async(notebook: str | Path, *args: Any, **options: Any) -> Any:
    """Start a run and wait for its end; other tasks of the cell go on meanwhile. See `trigger_and_wait`."""
    return await drive_async(_one(child(notebook, *args, **options).unopened()))


def trigger_batch_and_wait(children: Sequence[Child], *, on_error: OnError = "stop") -> list[Any]:
    """Start up to 1,000 runs in one transaction, wait until all have ended, and return their results, in order.

    `on_error`: "stop" raises the first failure, once all have ended; with "collect" a `ChildFailed` stands for each
    result that is missing; a number tolerates that many failures.
    """
    return drive(_all(children, on_error))


async def trigger_batch_and_wait_async(children: Sequence[Child], *, on_error: OnError = "stop") -> list[Any]:
    """Start runs and wait for all; other tasks of the cell go on meanwhile. See `trigger_batch_and_wait`."""
    return await drive_async(_all(children, on_error))


def _one(asked: Unopened) -> Steps[Any]:
    (wait,) = yield Gate([asked])
    return asked.outcome(wait)


def _all(children: Sequence[Child], on_error: OnError) -> Steps[list[Any]]:
    _check_batch(children)
    if on_error not in ("stop", "collect") and (isinstance(on_error, bool) or not isinstance(on_error, int)):
        raise UsageError(f"on_error={on_error!r} is not known", todo="use 'stop', 'collect' or a number")
    asked = [one.unopened() for one in children]
    waits = yield Gate(asked)
    results: list[Any] = []
    failures: list[ChildFailed] = []
    for one, wait in zip(asked, waits, strict=True):
        try:
            results.append(one.outcome(wait))
        except ChildFailed as error:
            failures.append(error)
            results.append(error)
    tolerated = {"stop": 0, "collect": len(children)}.get(str(on_error))
    if len(failures) > (int(on_error) if tolerated is None else tolerated):
        raise failures[0]
    return results


# Words ---------------------------------------------------------------------------------------------------


def _step() -> str | None:
    steps = extension.steps()
    execution = steps.execution if steps is not None else None
    return execution.name if execution is not None else None


def _comes_back() -> bool:
    """Tell whether the cell goes on behind a gate: what it waited for counts, whatever became of the notebook."""
    steps = extension.steps()
    execution = steps.execution if steps is not None else None
    return execution is not None and execution.comes_back


def _call(asked: str) -> str:
    """Name the call that starts a run: what it asks for, and how many equal ones came before it."""
    steps = extension.steps()
    execution = steps.execution if steps is not None else None
    if execution is None:
        cell = steps.cell if steps is not None else None
        return counted(digest("start", (cell.id if cell else None) or "cell", asked))
    identity = digest(recorded.scope(execution.calls), asked)
    with _counting:
        number = execution.starts[identity] = execution.starts.get(identity, 0) + 1
    return digest(identity, str(number))


def _result(run_id: str, notebook: str, form: Form | None, answer: WaitAnswer) -> Any:
    """Return a child's result; raises ChildFailed where it has none."""
    name = Path(notebook).name
    if not answer.approved:
        raise _failed(name, answer.value or {})
    if form is None:
        return answer.value
    if answer.value is None:
        raise UsageError(
            f"{name} completed and said no result, but `returns` asks for one",
            todo="let it call `durable.result(name=value)`, or leave `returns` out",
        )
    try:
        return form.made(answer.value)
    except ValueError as error:
        raise UsageError(
            f"the result of {name} is not what `returns` asks for: {error}",
            todo="let its `durable.result(…)` say what the model asks for, or change the model",
        ) from None


def _failed(name: str, end: Mapping[str, Any]) -> ChildFailed:
    run_id, status, error = str(end.get("run_id", "")), str(end.get("status")), end.get("error")
    said = f"{error['name']}: {error['message']}" if error else ""
    return ChildFailed(
        f"run {run_id[-8:]} of {name} is {status}: {said or end.get('reason', '')}",
        todo=f"`nbdurable show {run_id[-8:]}` tells its story; once `nbdurable resume {run_id[-8:]}` has let it go on, "
        "run this step again: it waits for the new end",
        run_id=run_id,
        status=status,
        error=said,
    )
