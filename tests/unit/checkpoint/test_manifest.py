"""Manifests: signed, and verified before anything else."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from nbdurable.checkpoint.blobs import BUFFER_CHUNK, LocalBlobs, digest_of
from nbdurable.checkpoint.manifest import (
    FORMAT,
    INLINE_BYTES,
    STREAM_CHUNK,
    STREAM_LEAST,
    Blob,
    CodeFacts,
    Group,
    Manifest,
    map_blob,
    put_blob,
    read_blob,
    seal,
    unseal,
)
from nbdurable.checkpoint.restore import restore
from nbdurable.errors import BadSignature, BlobDamaged, CheckpointError
from nbdurable.models import SignedManifest
from nbdurable.security import sign
from tests.tools.cells import KEY, Cells

EMPTY = Manifest(run_id="r", step="s", created_at=1.5, duration_s=2.0, code=CodeFacts(source="x", digest="d"))


def test_a_sealed_manifest_is_unsealed_as_it_was() -> None:
    """Guarantee 7."""
    assert unseal(seal(EMPTY, KEY), KEY, of="step `s`") == EMPTY


def test_another_key_is_refused_by_name() -> None:
    """Guarantee 8."""
    with pytest.raises(BadSignature, match="step `s`"):
        unseal(seal(EMPTY, KEY), b"1" * 32, of="step `s`")


def test_an_altered_manifest_is_refused_before_it_is_parsed() -> None:
    """Guarantee 8: text that is no JSON at all fails at its signature, not in the parser."""
    signed = seal(EMPTY, KEY)
    for text in (signed.text.replace('"s"', '"t"'), "{not json", ""):
        with pytest.raises(BadSignature):
            unseal(SignedManifest(text=text, signature=signed.signature), KEY, of="step `s`")


def test_a_newer_format_is_said_to_be_newer() -> None:
    """Guarantee 11."""
    text = json.dumps({**EMPTY.model_dump(mode="json"), "format": FORMAT + 1, "novelty": True})
    with pytest.raises(CheckpointError, match="newer nbdurable") as error:
        unseal(sign(text, KEY), KEY, of="step `s`")
    assert error.value.todo


def test_a_checkpoint_of_the_first_format_is_still_read(tmp_path: Path) -> None:
    """Guarantee 7: what format 1 wrote, in even chunks of 256 kB and without the fields that came later."""
    blobs = LocalBlobs(tmp_path)
    value = list(range(300_000))
    stream = pickle.dumps(value, protocol=5) + pickle.dumps({}, protocol=5)
    chunks = [stream[start : start + (256 << 10)] for start in range(0, len(stream), 256 << 10)]
    digests = tuple(blobs.put(chunk) for chunk in chunks)
    blob = Blob(
        digest=digest_of("".join(digests).encode()), size=len(stream), chunk=256 << 10, chunks=digests
    )
    fields = EMPTY.model_copy(update={"groups": (Group(names=("x",), stream=blob),)}).model_dump(mode="json")
    del fields["groups"][0]["stream"]["least"]
    signed = sign(json.dumps({**fields, "format": 1}), KEY)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    restore(unseal(signed, KEY, of="step `s`"), namespace, blobs)
    assert namespace["x"] == value


@pytest.mark.parametrize("size", [0, 10, INLINE_BYTES, INLINE_BYTES + 1])
def test_small_contents_travel_inside_the_manifest(tmp_path: Path, size: int) -> None:
    """A small value costs no file."""
    blobs = LocalBlobs(tmp_path)
    blob = put_blob(bytes(size), blobs)
    assert (blob.inline is None) == (size > INLINE_BYTES)
    assert bytes(read_blob(blob, blobs)) == bytes(size)
    if blob.inline is not None:
        with pytest.raises(BlobDamaged):
            read_blob(blob.model_copy(update={"size": size + 1}), blobs)


def test_a_pickle_bomb_in_a_tampered_manifest_does_not_go_off(tmp_path: Path) -> None:
    """Guarantee 8: whoever can write to the store, but has no key, runs no code in the kernel."""
    mark = tmp_path / "bang"
    cells = Cells(tmp_path)
    signed = cells.step("x = [1]")
    bomb = b"cos\nmkdir\n(V" + str(mark).encode() + b"\ntR.}."
    manifest = unseal(signed, KEY, of="step")
    stream = put_blob(bomb, cells.blobs)
    altered = manifest.model_copy(
        update={"groups": (manifest.groups[0].model_copy(update={"stream": stream}),)}
    )

    with pytest.raises(BadSignature):
        cells.restore(SignedManifest(text=altered.model_dump_json(), signature=signed.signature))
    assert not mark.exists()

    cells.restore(seal(altered, KEY))  # the bomb is a real one
    assert mark.exists()


def _written(root: Path, before: set[Path]) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file() and path not in before)


def _files(root: Path) -> set[Path]:
    return {path for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("size", [STREAM_CHUNK, STREAM_CHUNK + 1, 5 * STREAM_CHUNK, 2 * STREAM_CHUNK - 1])
def test_large_contents_are_kept_in_chunks(tmp_path: Path, size: int) -> None:
    """Guarantees 7 and 8: they come back whole and verified, and the manifest names every file."""
    blobs = LocalBlobs(tmp_path)
    data = os.urandom(size)
    blob = put_blob(data, blobs)
    assert bytes(read_blob(blob, blobs)) == bytes(map_blob(blob, blobs, "x")) == data
    assert set(blob.files()) == {path.name for path in _files(tmp_path)}
    assert sum(size for _, size in blob.parts()) == size
    path = blobs.path(blob.files()[-1])
    path.chmod(0o644)
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(BlobDamaged):
        read_blob(blob, blobs)


def test_one_more_message_writes_one_chunk(tmp_path: Path) -> None:
    """What did not change is not written again: of 10,000 messages and one more, the last 256 kB."""
    cells = Cells(tmp_path, "chat = [{'role': 'user', 'content': f'{i} ' * 200} for i in range(10_000)]")
    cells.step("chat.append({'role': 'user', 'content': 'first'})")
    before = _files(tmp_path)
    assert _written(tmp_path, set()) > 5 << 20
    signed = cells.step("chat.append({'role': 'user', 'content': 'one more'})")
    assert 0 < _written(tmp_path, before) <= 2 * STREAM_LEAST
    after = Cells(tmp_path)
    after.restore(signed)
    assert after["chat"] == cells["chat"]


def test_one_changed_number_writes_one_chunk(tmp_path: Path) -> None:
    """A changed part of an array is written alone, in chunks of 16 MB."""
    cells = Cells(tmp_path, "import numpy as np\na = np.arange(8 << 20, dtype='f8')")  # 64 MB
    cells.step("a[0] = 5")
    before = _files(tmp_path)
    signed = cells.step("a[3_000_000] = 5")
    assert 0 < _written(tmp_path, before) <= BUFFER_CHUNK + 1000
    after = Cells(tmp_path)
    after.restore(signed)
    assert after["a"].tobytes() == cells["a"].tobytes()
    after["a"][1] = 7  # in memory only
    assert after.fingerprints()["a"] != cells.fingerprints()["a"]
    after.restore(signed)
    assert after.fingerprints()["a"] == cells.fingerprints()["a"]
