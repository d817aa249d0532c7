"""Ids of runs and waits: their form, and what people may type for them."""

from __future__ import annotations

import uuid

from nbdurable.coordinator.names import as_run_id, as_wait_id, new_run_id, new_wait_id


def test_run_ids_are_uuid7_and_sort_by_time() -> None:
    ids = [new_run_id(at) for at in (1_700_000_000.0, 1_700_000_000.5, 1_800_000_000.0)]
    assert ids == sorted(ids)
    for one, at in zip(ids, (1_700_000_000_000, 1_700_000_000_500, 1_800_000_000_000), strict=True):
        parsed = uuid.UUID(one)
        assert (parsed.version, parsed.variant, parsed.int >> 80) == (7, uuid.RFC_4122, at)


def test_run_ids_of_one_moment_differ_in_the_digits_that_people_type() -> None:
    assert len({new_run_id(1.0)[-8:] for _ in range(1000)}) == 1000


def test_wait_ids_can_be_read_out() -> None:
    for _ in range(200):
        wait_id = new_wait_id()
        assert len(wait_id) == 6
        assert not set(wait_id) & set("ILOU")
        assert as_wait_id(f" {wait_id.lower()} ") == wait_id
    assert as_wait_id("oil7k2") == "0117K2"


def test_typed_run_ids() -> None:
    assert as_run_id(" 0199F3C2-0000 ") == "0199f3c20000"
