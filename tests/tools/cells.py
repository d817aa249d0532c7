"""A notebook without Jupyter: cells run in a namespace, checkpoints are made of what they wrote, as the kernel does."""

from __future__ import annotations

import ast
import itertools
import linecache
from pathlib import Path
from typing import Any

from nbdurable.checkpoint.analysis import analyse, uses
from nbdurable.checkpoint.blobs import LocalBlobs
from nbdurable.checkpoint.manifest import CodeFacts, Manifest, seal, unseal
from nbdurable.checkpoint.restore import restore
from nbdurable.checkpoint.save import save
from nbdurable.checkpoint.track import Changes, Tracker
from nbdurable.models import SignedManifest

KEY = b"0" * 32
_numbers = itertools.count()


class Cells:
    """A namespace in which cells run."""

    def __init__(self, folder: Path, *plain: str) -> None:
        self.folder = folder
        self.blobs = LocalBlobs(folder / "blobs")
        self.namespace: dict[str, Any] = {"__name__": "__main__"}
        self.tracker = Tracker(self.namespace)
        for source in plain:
            self.run(source)

    def __getitem__(self, name: str) -> Any:
        return self.namespace[name]

    def run(self, source: str) -> None:
        """Run a cell, whose source can be found as that of a cell in IPython can."""
        file = f"<cell {next(_numbers)}>"
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        exec(compile(source, file, "exec", dont_inherit=True), self.namespace)

    def watch(self, source: str) -> Changes:
        """Run a cell and return what it changed."""
        before = self.tracker.snapshot()
        names = analyse(ast.parse(source), source)
        mentioned = uses(names.loads, self.namespace, self.folder).inputs
        self.run(source)
        return self.tracker.changes(before, mentioned)

    def step(self, source: str, name: str = "step") -> SignedManifest:
        """Run a cell and return its checkpoint."""
        changes = self.watch(source)
        return self.checkpoint(changes, name)

    def checkpoint(self, changes: Changes, name: str = "step") -> SignedManifest:
        saved = save(
            self.namespace,
            changes.written,
            self.blobs,
            fingerprints=changes.fingerprints,
            walks=changes.walks,
            random=changes.random,
        )
        self.blobs.sync()
        manifest = Manifest(
            run_id="0" * 32,
            step=name,
            created_at=0.0,
            duration_s=0.0,
            code=CodeFacts(source="", digest=""),
            fingerprints=saved.fingerprints,
            variables=saved.variables,
            groups=saved.groups,
            deleted=tuple(sorted(changes.deleted)),
            random=saved.random,
        )
        return seal(manifest, KEY)

    def restore(self, signed: SignedManifest) -> Manifest:
        """Put a checkpoint back, as a new process would."""
        manifest = unseal(signed, KEY, of="step")
        restore(manifest, self.namespace, LocalBlobs(self.blobs.root))
        return manifest

    def fingerprints(self) -> dict[str, str]:
        """Return the fingerprint of every variable."""
        return {name: seen.digest for name, seen in Tracker(self.namespace).snapshot().variables.items()}
