"""Events that were sent: which are still kept, who has taken them, and which keys stand for which.

Owns this memory, rebuilt from the store's history at start; payloads stay in the store. Decides nothing about waits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from nbdurable.contract import EVENT_LIFE_S
from nbdurable.models import Sent
from nbdurable.store.port import StoredSent


@dataclass(slots=True)
class Kept:
    """An event in memory, without its payload."""

    seq: int
    event: str
    at: float
    expires_at: float
    key: str | None
    digest: str  # of the payload
    runs: dict[str, None] = field(default_factory=dict)  # that have taken it

    def sent(self) -> Sent:
        """Return what people see."""
        return Sent(
            seq=self.seq, event=self.event, at=self.at, expires_at=self.expires_at, runs=tuple(self.runs)
        )

    @property
    def forget_at(self) -> float:
        """Return when neither a wait takes it nor its key counts any more."""
        return max(self.expires_at, self.at + EVENT_LIFE_S)


class Mailbox:
    """The events that are kept, by name, in the order in which they were sent."""

    def __init__(self, stored: Iterable[StoredSent], taken: Iterable[tuple[int, str]], now: float) -> None:
        self._by_name: dict[str, dict[int, Kept]] = {}
        self._by_key: dict[tuple[str, str], Kept] = {}
        self._by_seq: dict[int, Kept] = {}
        for one in stored:
            kept = Kept(one.seq, one.event, one.at, one.expires_at, one.key, one.digest)
            if kept.forget_at > now:
                self.keep(kept)
        for seq, run_id in taken:
            self.take(seq, run_id)

    def keep(self, kept: Kept) -> None:
        """Remember an event."""
        self._by_name.setdefault(kept.event, {})[kept.seq] = self._by_seq[kept.seq] = kept
        if kept.key is not None:
            self._by_key[kept.event, kept.key] = kept

    def take(self, seq: int, run_id: str) -> None:
        """Remember that a run has taken an event."""
        if (kept := self._by_seq.get(seq)) is not None:
            kept.runs[run_id] = None

    def with_key(self, event: str, key: str | None, now: float) -> Kept | None:
        """Return the event that was sent with a key, while that counts."""
        kept = None if key is None else self._by_key.get((event, key))
        return kept if kept is not None and kept.forget_at > now else None

    def for_run(self, event: str, run_id: str, now: float) -> list[Kept]:
        """Return the events of a name that a run may still take, oldest first."""
        return [
            kept
            for kept in self._by_name.get(event, {}).values()
            if kept.expires_at > now and run_id not in kept.runs
        ]

    def forget(self, now: float) -> None:
        """Forget what has expired."""
        for kept in [kept for kept in self._by_seq.values() if kept.forget_at <= now]:
            del self._by_seq[kept.seq], self._by_name[kept.event][kept.seq]
            if not self._by_name[kept.event]:
                del self._by_name[kept.event]
            if kept.key is not None and self._by_key.get((kept.event, kept.key)) is kept:
                del self._by_key[kept.event, kept.key]


def data_of(
    event: str, payload: Any, key: str | None, digest: str, expires_at: float, by: str
) -> dict[str, Any]:
    """Return what the history keeps of a sent event."""
    return {
        "event": event,
        "payload": payload,
        "key": key,
        "digest": digest,
        "expires_at": expires_at,
        "by": by,
    }
