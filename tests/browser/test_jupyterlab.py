"""`%%step` in a real JupyterLab, in a real browser: what a person sees there (guarantees 1, 4, 5, 7, 9)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.blocking import BlockingKernelClient
from playwright.sync_api import Browser, Locator, Page, expect

from nbdurable import processes
from nbdurable.settings import Home
from tests.tools import notebooks
from tests.tools.processes import end_processes_of, until

pytestmark = [pytest.mark.browser, pytest.mark.timeout(120)]

TOKEN = "only-for-this-test"
TALL = {"width": 1200, "height": 1700}
CELL_MS = 40_000  # for a cell's end, on a busy machine
SETTINGS = {
    "apputils-extension/notification": {
        "fetchNews": "false",
        "checkForUpdates": False,
        "doNotDisturbMode": True,
    },
    "notebook-extension/tracker": {"windowingMode": "none"},
    "docmanager-extension/plugin": {"autosave": False},
}
LOAD = "%load_ext nbdurable\nimport nbdurable as durable\nimport random"
STEPS = [
    "%%step table\nimport pandas as pd\nrows = pd.DataFrame({'x': [random.random() for _ in range(3)]})\nrows",
    "%%step figure\n%matplotlib inline\nimport matplotlib.pyplot as plt\n"
    "plt.figure(figsize=(3, 1.5))\nplt.plot(rows['x']);",
    "%%step words\nprint('first line')\nprint('a warning', file=__import__('sys').stderr)\n"
    "lines = (line for line in ['a'])\nlucky = random.randrange(10**9)\nlucky",
]
SHOW = "print('lucky is', lucky)"
APPROVAL = (
    "%%step gate\ncount = globals().get('count', 0) + 1\n"
    "answer = durable.approve('# A draft\\n\\nof text', title='Publish?')"
)


@dataclass
class Lab:
    """A JupyterLab server on a folder."""

    url: str
    folder: Path
    runtime: Path
    home: Home

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Ask the server's REST API."""
        request = urllib.request.Request(
            f"{self.url}/api/{path}",
            headers={"Authorization": f"token {TOKEN}", "Content-Type": "application/json"},
            data=None if body is None else json.dumps(body).encode(),
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def nbdurable(self, *words: str) -> str:
        """Run a command of ours in a terminal beside it."""
        env = {**os.environ, "NBDURABLE_HOME": str(self.home.root)}
        command = [sys.executable, "-m", "nbdurable", *words]
        return subprocess.run(
            command, env=env, check=True, capture_output=True, text=True, cwd=self.folder
        ).stdout


@pytest.fixture(scope="module")
def lab(chromium: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A server with a settings folder of its own, which asks nothing outside this machine."""
    folder = tmp_path_factory.mktemp("lab")
    for name, values in SETTINGS.items():
        file = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    home = Home(folder / ".nbdurable").create()
    env = {
        **os.environ,
        **{f"JUPYTER_{kind}_DIR": str(folder / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")},
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "IPYTHONDIR": str(folder / "ipython"),
        "NBDURABLE_HOME": str(home.root),
    }
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--port=0",
        f"--notebook-dir={folder}",
    ]
    command += [
        f"--IdentityProvider.token={TOKEN}",
        "--LabApp.expose_app_in_browser=True",
        "--LabApp.news_url=",
    ]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=log)
    try:

        def where() -> str | None:
            assert server.poll() is None, processes.tail(folder / "server.log")
            found = folder / "runtime" / f"jpserver-{server.pid}.json"
            return str(json.loads(found.read_text())["url"]) if found.exists() else None

        yield Lab(until(where, what="JupyterLab serves").rstrip("/"), folder, folder / "runtime", home)
    finally:
        server.terminate()  # ends its kernels, too
        server.wait(30)
        end_processes_of(home)


@dataclass
class Tab:
    """A notebook that stands open in a browser tab."""

    page: Page
    shots: Path

    def command(self, name: str) -> None:
        """Run a command of JupyterLab's menus without waiting for its end."""
        self.page.evaluate("name => void window.jupyterapp.commands.execute(name)", name)

    def cell(self, index: int) -> Locator:
        return self.page.locator(".jp-Notebook .jp-CodeCell").nth(index)

    def output(self, index: int) -> Locator:
        return self.cell(index).locator(".jp-OutputArea-output")

    def notes(self, index: int) -> str:
        """Return nbdurable's own lines of a cell."""
        return "\n".join(text for text in self.output(index).all_inner_texts() if re.match(r"[✓↺✗⏸]", text))

    def own(self, index: int) -> list[str]:
        """Return what a cell shows, without nbdurable's lines; a picture as its bytes."""
        shown = []
        for one in self.output(index).all():
            picture = one.locator("img")
            text = picture.get_attribute("src") if picture.count() else one.inner_text()
            if text and not re.match(r"[✓↺✗⏸]", text):
                shown.append(text)
        return shown

    def ended(self, index: int, number: int) -> None:
        """Wait until a cell has ended as the kernel's `number`th."""
        expect(self.cell(index).locator(".jp-InputPrompt")).to_have_text(f"[{number}]:", timeout=CELL_MS)

    def run_all(self, count: int) -> None:
        self.command("notebook:run-all-cells")
        self.ended(count - 1, count)

    def restart(self) -> None:
        """Restart the kernel from the menu, and confirm."""
        self.command("kernelmenu:restart-and-clear")
        self.page.locator(".jp-Dialog button", has_text="Restart").click()
        expect(self.cell(0).locator(".jp-InputPrompt")).to_have_text("[ ]:")
        self.ready()

    def ready(self) -> None:
        """Wait until the notebook's kernel is there and idle."""
        self.page.wait_for_function(
            """() => {
                const context = window.jupyterapp?.shell.currentWidget?.sessionContext;
                const kernel = context?.session?.kernel;
                return context?.isReady && kernel?.connectionStatus === 'connected' && kernel.status === 'idle';
            }""",
            timeout=CELL_MS,
        )

    def shoot(self, name: str, index: int | None = None) -> None:
        """Keep pictures in both themes for people to look at."""
        for theme in ("Light", "Dark"):
            self.page.evaluate(
                "theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})",
                f"JupyterLab {theme}",
            )
            expect(self.page.locator("body")).to_have_attribute(
                "data-jp-theme-light", str(theme == "Light").lower()
            )
            expect(self.page.locator("#jupyterlab-splash")).to_have_count(0)
            target: Any = self.page if index is None else self.cell(index)
            target.screenshot(path=self.shots / f"{name}-{theme.lower()}.png")


@pytest.fixture
def open_notebook(lab: Lab, chromium: Browser, shots: Path) -> Iterator[Any]:
    """Opens notebooks, each in a tab of its own browser; their kernels end with the test."""
    contexts = []

    def open_(name: str, cells: list[str]) -> Tab:
        notebooks.write(lab.folder / name, cells)
        context = chromium.new_context(viewport=TALL)  # type: ignore[arg-type]
        contexts.append(context)
        page = context.new_page()
        page.goto(f"{lab.url}/lab/tree/{name}?token={TOKEN}&reset")
        tab = Tab(page, shots)
        tab.ready()
        return tab

    yield open_
    for context in contexts:
        context.close()


def test_restart_and_run_all_restores_every_step(lab: Lab, open_notebook: Any) -> None:
    """Guarantees 1, 7, 9: after a restart every step says ↺, with the same outputs on the page and the same values."""
    cells = [LOAD, *STEPS, SHOW]
    tab = open_notebook("steps.ipynb", cells)
    tab.run_all(len(cells))
    assert [tab.notes(i)[0] for i in (1, 2, 3)] == ["✓", "✓", "✓"]
    first = [tab.own(i) for i in range(1, 5)]
    assert "first line" in first[2][0]
    assert first[1][0].startswith("data:image/png")
    tab.shoot("lab-first")
    tab.restart()
    tab.run_all(len(cells))
    for i in (1, 2, 3):
        assert tab.notes(i).startswith("↺")
        assert "same code and inputs" in tab.notes(i)
    assert [tab.own(i) for i in range(1, 5)] == first
    assert "3 of 3 steps kept" in tab.output(0).first.inner_text()
    tab.shoot("lab-restored")


def test_an_approval_and_a_second_kernel(lab: Lab, open_notebook: Any) -> None:
    """Guarantees 4, 5: the card, an interrupt, an answer from a terminal; another kernel is told who drives the run."""
    tab = open_notebook("gate.ipynb", [LOAD, APPROVAL, "print(count, answer.by != '')"])
    tab.command("notebook:run-all-cells")
    card = tab.output(1).filter(has_text="nbdurable approve")
    expect(card).to_be_visible(timeout=CELL_MS)
    [wait_id] = re.findall(r"nbdurable approve (\S+)", card.inner_text())
    assert "of text" in card.inner_text()
    tab.shoot("lab-approval-open")

    began = time.perf_counter()
    tab.command("notebook:interrupt-kernel")
    expect(tab.output(1).filter(has_text="KeyboardInterrupt").first).to_be_visible()
    took = time.perf_counter() - began
    print(f"\ninterrupt of a waiting approval, until it is seen on the page: {took:.2f} s")
    assert took < 3, "within half a second on an idle machine"
    expect(tab.output(1).filter(has_text="above its gate is kept")).to_be_visible()
    tab.shoot("lab-approval-interrupted", 1)

    told = run_in_another_kernel(lab, "gate.ipynb", "%load_ext nbdurable")
    assert re.search(r"driven by .*kernel \d+", told), told
    assert "%durable takeover" in told

    lab.nbdurable("approve", wait_id, "--comment", "well written")
    tab.command("notebook:run-all-cells")
    expect(tab.output(2)).to_have_text("1 True", timeout=CELL_MS)
    card = tab.output(1).filter(has_text="Publish?")
    assert "approved by" in card.inner_text()
    assert "well written" in card.inner_text()
    tab.shoot("lab-approval-decided")


def run_in_another_kernel(lab: Lab, notebook: str, code: str) -> str:
    """Start a second kernel for a notebook through the REST API, run a cell in it, and return what it displays."""
    body = {"path": f"./{notebook}", "name": "", "type": "notebook", "kernel": {"name": "python3"}}
    session = lab.ask("sessions", body)
    file = lab.runtime / f"kernel-{session['kernel']['id']}.json"
    client = BlockingKernelClient(
        connection_file=str(until(lambda: file.exists() and file, what="a second kernel"))
    )
    client.load_connection_file()
    client.start_channels()
    shown: list[str] = []
    try:
        client.wait_for_ready(timeout=60)
        client.execute_interactive(
            code, output_hook=lambda message: shown.append(json.dumps(message["content"])), timeout=60
        )
    finally:
        client.stop_channels()
    return "\n".join(shown)
