"""What all tests share: a project's home of their own, and the certainty that nothing outlives them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdurable.settings import Home
from tests.tools.processes import Coordinator, end_processes_of


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the harnesses in their full length")


def pytest_configure(config: pytest.Config) -> None:
    """Keep which stores are trusted in a folder of this session's, not among the developer's own files."""
    os.environ["NBDURABLE_CONFIG"] = tempfile.mkdtemp(prefix="nbdurable-tests-")


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(os.environ.pop("NBDURABLE_CONFIG"), ignore_errors=True)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """A new project's state folder, which `NBDURABLE_HOME` names; its processes are ended after the test."""
    found = Home(tmp_path / ".nbdurable").create()
    monkeypatch.setenv("NBDURABLE_HOME", str(found.root))
    yield found
    end_processes_of(found)


@pytest.fixture
def coordinator(home: Home) -> Iterator[Coordinator]:
    """The coordinator of `home`, started by the first call of `.client`."""
    found = Coordinator(home)
    yield found
    found.client.close()


@pytest.fixture(scope="module")
def started_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Home]]:
    """Makes homes whose processes are ended when the next one is made, and after the module."""
    made: list[Home] = []

    def make() -> Home:
        for former in made:
            end_processes_of(former)
        made[:] = [Home(tmp_path_factory.mktemp("project") / ".nbdurable").create()]
        return made[0]

    yield make
    for former in made:
        end_processes_of(former)
