"""Runs, waits, events and manifests for tests of stores: whole shapes, short to write."""

from __future__ import annotations

from typing import Any

from nbdurable.models import DriverKind, Run, RunStatus, SignedManifest, Wait, WaitKind
from nbdurable.store.port import NewEvent


def run_id(number: int) -> str:
    """Return the id of a run; a greater number is a newer run."""
    return f"{number:032x}"


def run(number: int = 1, **fields: Any) -> Run:
    """Return a running headless run."""
    usual: dict[str, Any] = {
        "id": run_id(number),
        "notebook": "/work/agent.ipynb",
        "status": RunStatus.RUNNING,
        "reason": "leased",
        "kind": DriverKind.HEADLESS,
        "created_at": 1_000.25 + number,
        "updated_at": 1_000.25 + number,
    }
    return Run(**(usual | fields))


def wait(identity: str = "7K2M00", **fields: Any) -> Wait:
    """Return an open approval."""
    usual: dict[str, Any] = {
        "id": identity,
        "run_id": run_id(1),
        "key": "review/1",
        "kind": WaitKind.APPROVAL,
        "title": "Publish?",
        "created_at": 1_000.25,
    }
    return Wait(**(usual | fields))


def event(number: int = 1, **fields: Any) -> NewEvent:
    """Return an event that is no step's."""
    usual: dict[str, Any] = {
        "at": 1_000.25,
        "run_id": run_id(number),
        "epoch": 1,
        "kind": "run_moved",
        "sentence": "leased to worker 1",
    }
    return NewEvent(**(usual | fields))


def commit(step: str, kind: str = "step_completed", text: str = "{}", number: int = 1) -> NewEvent:
    """Return an event that commits a checkpoint."""
    manifest = SignedManifest(text=text, signature="5" * 64)
    return event(number, kind=kind, step=step, sentence=f"{step} committed", manifest=manifest)
