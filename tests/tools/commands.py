"""The real command line in processes of their own, in a project of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.tools import notebooks

DEADLINE_S = 60.0
_LOAD = "%load_ext nbdurable\nimport nbdurable as durable"


@dataclass(frozen=True)
class Project:
    """A folder with a project's state, and the commands that are typed in it.

    `config`: where its user notes which stores are trusted, if not where the whole session of tests does.
    """

    folder: Path
    config: Path | None = None

    @property
    def home(self) -> Path:
        return self.folder / ".nbdurable"

    @property
    def environment(self) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if name == "NBDURABLE_CONFIG" or not name.startswith(("NBDURABLE_", "JPY_"))
        }
        if self.config is not None:
            kept["NBDURABLE_CONFIG"] = str(self.config)
        return kept | {"NBDURABLE_HOME": str(self.home)}

    @contextmanager
    def start(self, *words: str) -> Iterator[subprocess.Popen[str]]:
        """Start a command; nobody answers its questions. It does not outlive the block."""
        process = subprocess.Popen(
            [sys.executable, "-m", "nbdurable", *words],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    def run(self, *words: str, deadline_s: float = DEADLINE_S) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; whatever happens, stderr shows no traceback."""
        with self.start(*words) as process:
            try:
                out, err = process.communicate(timeout=deadline_s)
            except subprocess.TimeoutExpired:
                process.kill()
                out, err = process.communicate()
                raise AssertionError(f"{' '.join(words)} did not end in time:\n{out}{err}") from None
        assert "Traceback" not in err, err
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def json(self, *words: str) -> Any:
        """Run a command that succeeds, and return what it printed as JSON."""
        found = self.run(*words, "--json")
        assert found.returncode == 0, found.stderr
        return json.loads(found.stdout)

    def notebook(self, name: str, *cells: str, parameters: str | None = None) -> Path:
        """Write a notebook; `parameters` is the source of the cell with that tag."""
        return notebooks.write(self.folder / name, [_LOAD, *cells], parameters=parameters)
