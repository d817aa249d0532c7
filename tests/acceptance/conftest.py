"""Projects for commands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdurable.settings import Home
from tests.tools.commands import Project
from tests.tools.processes import end_processes_of


@pytest.fixture(scope="module")
def project(started_home: Callable[[], Home]) -> Project:
    """Return a project that the tests of a file share."""
    return Project(started_home().root.parent)


@pytest.fixture
def own_project(tmp_path: Path) -> Iterator[Project]:
    """Make a project of one test, which may do harm to it; there is no state yet."""
    yield Project(tmp_path)
    end_processes_of(Home(tmp_path / ".nbdurable"))
