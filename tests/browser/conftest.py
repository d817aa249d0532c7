"""A real browser, the real pages, a real coordinator."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, expect, sync_playwright

from nbdurable.settings import Home
from tests.tools.pages import WIDE, Project, Tab, let_in, serve

CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
PATIENCE_MS = 30_000  # on a busy machine


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """A Chromium; without one the tests are skipped, but not in CI.

    No longer than a file's tests: as long as Playwright runs, no test of this process can run an event loop.
    """
    found = CHROMIUM if Path(CHROMIUM).exists() else shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        message = "no Chromium: install it (apt install chromium) to test the pages in a browser"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def project(started_home: Callable[[], Home]) -> Iterator[Project]:
    """A project that the tests of a file share, each with runs of its own."""
    with serve(started_home()) as found:
        yield found


@pytest.fixture
def own_project(home: Home) -> Iterator[Project]:
    """A project of one test, which is empty at first and may come to harm."""
    with serve(home) as found:
        yield found


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    """Where pictures go: `NBDURABLE_SHOTS`, or nowhere that lasts."""
    folder = Path(os.environ.get("NBDURABLE_SHOTS") or tmp_path / "shots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def context(chromium: Browser) -> Iterator[BrowserContext]:
    """A browser without cookies."""
    with chromium.new_context(viewport=WIDE) as found:  # type: ignore[arg-type]
        found.set_default_timeout(PATIENCE_MS)
        yield found


@pytest.fixture
def tab(project: Project, context: BrowserContext, shots: Path) -> Iterator[Tab]:
    """A tab on the shared project."""
    with let_in(project, context, shots) as found:
        yield found


@pytest.fixture
def own_tab(own_project: Project, context: BrowserContext, shots: Path) -> Iterator[Tab]:
    """A tab on the project of one test."""
    with let_in(own_project, context, shots) as found:
        yield found
