"""The manifest: what a checkpoint consists of, as data, signed.

Owns the shape, its signature and the bytes that travel inside it. Knows nothing of values: no pickle here. A
manifest is parsed only after its signature was verified, and it carries the digest of every byte that is ever
unpickled.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import Literal, TypeVar

from pydantic import Field, ValidationError

from nbdurable.checkpoint.blobs import BUFFER_CHUNK, MAP_FROM_BYTES, BlobStore, digest_of
from nbdurable.checkpoint.mapped import Piece
from nbdurable.errors import BlobDamaged, CheckpointError
from nbdurable.models import Shape, SignedManifest, Variable
from nbdurable.security import sign, verify

FORMAT = 2
READS = (1, 2)  # format 1 cut pickles into even chunks: a `Blob` of it has no `least`
INLINE_BYTES = 16 << 10  # at most; larger contents are files
STREAM_CHUNK = 1 << 20  # of pickles: a smaller file costs as much fsync
STREAM_LEAST = 256 << 10  # but what is appended to a list leaves all before its last 256 kB as it was


class InputFact(Shape):
    """What an input was when the step ran."""

    value: str  # fingerprint of its value
    origin: str  # fingerprint of the source that last wrote it
    label: str = ""  # that source, for people: "the cell `n = 5`", "step clean"
    cell: str = ""  # where that stands, for people: "cell 2"
    line: int = 0  # of that cell; 0 where it is not known
    via: str = ""  # the helper that reads it; "" where the step itself does


class HelperFact(Shape):
    """What a function or class of the notebook was when the step that uses it ran."""

    ast: str  # digest of its code without positions, comments and whitespace
    state: dict[str, str] | None  # "default `n`" and the like → fingerprint; None where nothing ran
    source: str = ""  # at most 20 kB, to show what changed
    label: str = ""  # where it stands, for people: "cell 2"
    line: int = 0  # of that cell, at which it begins; 0 where it is not known


class ModuleFact(Shape):
    """What a module of the project was when the step that imports it ran."""

    digest: str
    file: str  # from the project's folder
    outline: str = ""  # `line:digest` of its statements, at most 2000, to show what changed


class CodeFacts(Shape):
    """The code that a step ran."""

    source: str
    first_line: int = 1  # of the cell, at which `source` begins
    digest: str
    helpers: dict[str, HelperFact] = Field(default_factory=dict)
    imports: dict[str, str] = Field(
        default_factory=dict
    )  # name → "math:floor", the foreign object that it means
    modules: dict[str, ModuleFact] = Field(default_factory=dict)
    packages: dict[str, str] = Field(default_factory=dict)  # distribution → version
    watched: dict[str, dict[str, str]] = Field(default_factory=dict)  # as `checkpoint/watched.py` finds it
    python: str = ""  # "3.11"


def cuts(size: int, chunk: int, least: int = 0) -> list[int]:
    """Return the sizes of the chunks that so many bytes are cut into.

    What is left behind the last whole chunk is cut at its halves, quarters and so on, down to `least`: so few files
    hold many bytes, and yet bytes that are appended change no more than the last one.
    """
    whole, rest = divmod(size, chunk)
    sizes = [chunk] * whole
    half = chunk // 2
    while least and half >= least:
        if rest >= half:
            sizes.append(half)
            rest -= half
        half //= 2
    return [*sizes, rest] if rest else sizes


class Blob(Shape):
    """Bytes of a checkpoint: a file of the blob store, several of them, or base64 inside the manifest.

    `digest` names the content; that of several files is the digest of theirs. Use `files` to know which
    blobs of the store it needs.
    """

    digest: str
    size: int
    inline: str | None = None
    chunk: int = 0  # size in bytes of each chunk but the last ones
    least: int = (
        0  # size down to which what is left at the end is cut into halves of a chunk; 0: it is one chunk
    )
    chunks: tuple[str, ...] = ()  # their digests, where there are several

    def parts(self) -> tuple[tuple[str, int], ...]:
        """Return (digest, size in bytes) of the blobs of the store that hold it, in order."""
        if self.inline is not None:
            return ()
        if not self.chunks:
            return ((self.digest, self.size),)
        return tuple(zip(self.chunks, cuts(self.size, self.chunk, self.least), strict=True))

    def files(self) -> tuple[str, ...]:
        """Return the digests of the files that hold these bytes; none where they are inside the manifest."""
        return tuple(digest for digest, _ in self.parts())


class Group(Shape):
    """Variables that were pickled together because they share objects.

    `stream` holds one pickle per name, in the order of `names`, and one of the sources of code, all with one
    memo; `buffers` are those out of band.
    """

    names: tuple[str, ...]
    stream: Blob
    buffers: tuple[Blob, ...] = ()
    code: bool = (
        False  # it holds functions or classes by value, which only the same version of Python can load
    )
    recipe: str = ""  # what it counts by, where the stream holds the function that makes the variable again


class Manifest(Shape):
    """A checkpoint: everything that a committed step left."""

    format: Literal[1, 2] = 2
    run_id: str
    step: str
    created_at: float
    duration_s: float
    code: CodeFacts
    inputs: dict[str, InputFact] = Field(default_factory=dict)
    fingerprints: dict[str, str] = Field(default_factory=dict)  # of every written name, after the step
    variables: tuple[Variable, ...] = ()
    groups: tuple[Group, ...] = ()
    later: tuple[Group, ...] = ()  # recipes, and groups that refer to what they make, in the order of making
    deleted: tuple[str, ...] = ()
    random: Blob | None = None
    outputs: Blob | None = None  # JSON list of nbformat outputs
    resume_at: int | None = None  # top-level statement at which a waiting cell goes on
    wait_keys: tuple[str, ...] = ()
    calls: dict[str, int] = Field(
        default_factory=dict
    )  # of a waiting step: how many equal calls it made above its gate
    starts: dict[str, int] = Field(
        default_factory=dict
    )  # of a waiting cell: how often it started each run so far
    skips_rest: str | None = None  # why the notebook ends behind this step
    by_hand: str = ""  # who did the step by hand, and when; it left nothing, and its code was not run

    def files(self) -> set[str]:
        """Return the digests of all files that this checkpoint needs."""
        return {digest for blob in self.blobs() for digest in blob.files()}

    def blobs(self) -> tuple[Blob, ...]:
        """Return everything that this checkpoint needs."""
        grouped = tuple(blob for group in self.groups + self.later for blob in (group.stream, *group.buffers))
        return grouped + tuple(blob for blob in (self.random, self.outputs) if blob is not None)


class CallManifest(Shape):
    """A recorded call: its result, and what else it left.

    `value` is the result, pickled alone under the name "". `shares`: it refers to objects of what the call was given.
    """

    format: Literal[1] = 1
    run_id: str
    step: str
    key: str  # names the call within its step
    name: str
    created_at: float
    duration_s: float
    code: str  # digest of what its function stands on
    parts: dict[str, str] = Field(default_factory=dict)  # of that, by name, to say what changed
    value: Group
    shares: bool = False
    random: Blob | None = None
    outputs: Blob | None = None  # JSON list of nbformat outputs

    def files(self) -> set[str]:
        """Return the digests of all files that this call needs."""
        return {digest for blob in self.blobs() for digest in blob.files()}

    def blobs(self) -> tuple[Blob, ...]:
        """Return everything that this call needs."""
        others = (blob for blob in (self.random, self.outputs) if blob is not None)
        return (self.value.stream, *self.value.buffers, *others)


Sealed = TypeVar("Sealed", Manifest, CallManifest)


def put_blob(data: bytes | memoryview, blobs: BlobStore) -> Blob:
    """Keep bytes for a manifest: up to 16 kB inside it, more in the blob store (durable after its `sync`)."""
    return put_blobs([data], [], blobs)[0]


def put_blobs(
    streams: Sequence[bytes | memoryview],
    buffers: Sequence[memoryview],
    blobs: BlobStore,
    looked: Mapping[Piece, str] = MappingProxyType({}),
) -> list[Blob]:
    """Keep pickles and then data, as `put_blob` does, all at once.

    More than a chunk becomes several files, of which those that stand already are not written again. `looked`: as
    `BlobStore.put_all` takes it.
    """
    views = [(memoryview(data).cast("B"), STREAM_CHUNK, STREAM_LEAST) for data in streams]
    views += [(data.cast("B"), BUFFER_CHUNK, 0) for data in buffers]
    pieces = []
    for view, chunk, least in views:
        start = 0
        for size in cuts(len(view), chunk, least) if len(view) > INLINE_BYTES else ():
            pieces.append(view[start : start + size])
            start += size
    digests = iter(blobs.put_all(pieces, looked))
    kept = []
    for view, chunk, least in views:
        if len(view) <= INLINE_BYTES:
            inline = base64.b64encode(view).decode()
            kept.append(Blob(digest=digest_of(view), size=len(view), inline=inline))
            continue
        own = tuple(islice(digests, len(cuts(len(view), chunk, least))))
        if len(own) == 1:
            kept.append(Blob(digest=own[0], size=len(view)))
        else:
            whole = digest_of("".join(own).encode())
            kept.append(Blob(digest=whole, size=len(view), chunk=chunk, least=least, chunks=own))
    return kept


def read_blob(blob: Blob, blobs: BlobStore) -> memoryview:
    """Return a manifest's bytes, verified; raises BlobMissing, BlobDamaged."""
    if blob.inline is not None:
        data = bytearray(base64.b64decode(blob.inline))
        if len(data) != blob.size or digest_of(data) != blob.digest:
            raise BlobDamaged(
                f"the inlined blob {blob.digest} is not what was written", todo="run the step again"
            )
        return memoryview(data)
    files = blob.parts()
    if len(files) == 1:
        return blobs.read(*files[0])
    return memoryview(bytearray().join(blobs.read(*file) for file in files))


def map_blob(blob: Blob, blobs: BlobStore, needed_by: str) -> memoryview:
    """Return a manifest's bytes that are never unpickled: large ones mapped, and verified later (`BlobStore.map`)."""
    if blob.size < MAP_FROM_BYTES:
        return read_blob(blob, blobs)
    return blobs.map(blob.parts(), needed_by)


def seal(manifest: Manifest | CallManifest, key: bytes) -> SignedManifest:
    """Sign a manifest with the project's key."""
    return sign(manifest.model_dump_json(), key)


def unseal(signed: SignedManifest, key: bytes, *, of: str) -> Manifest:
    """Return a manifest once its signature holds; `of` names the checkpoint in errors.

    Raises BadSignature before anything is parsed, CheckpointError for a manifest of a newer nbdurable.
    """
    return _unsealed(signed, key, of, Manifest)


def unseal_call(signed: SignedManifest, key: bytes, *, of: str) -> CallManifest:
    """Return a call's manifest once its signature holds, as `unseal` does."""
    return _unsealed(signed, key, of, CallManifest)


def _unsealed(signed: SignedManifest, key: bytes, of: str, shape: type[Sealed]) -> Sealed:
    text = verify(signed, key, of=of)
    fields = json.loads(text)
    if fields.get("format") not in READS:
        raise CheckpointError(
            f"{of} has format {fields.get('format')!r}, of a newer nbdurable (this one reads {FORMAT})",
            todo="upgrade nbdurable here, or run the step again (`%durable rerun NAME`)",
        )
    try:
        return shape.model_validate(fields)
    except ValidationError as error:
        raise CheckpointError(
            f"{of} has {error.error_count()} fields that this nbdurable can't read: another version wrote it",
            todo="upgrade nbdurable here, or run the step again (`%durable rerun NAME`)",
        ) from error
