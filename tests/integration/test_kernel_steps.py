"""`%%step` in a real kernel: what a person sees and gets (design §5, guarantees 1, 2, 6, 7, 9, 11)."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdurable import contract
from nbdurable.client import Client
from nbdurable.models import RunStatus, StepStatus
from nbdurable.settings import Home
from tests.tools import notebooks
from tests.tools.kernels import Kernel, Reply

LOAD = "%load_ext nbdurable"


@pytest.fixture
def kernel(home: Home, coordinator: Any, tmp_path: Path) -> Iterator[Kernel]:
    """A kernel of the notebook `n.ipynb`, with the extension loaded."""
    found = Kernel(home.root, notebooks.write(tmp_path / "n.ipynb", []), tmp_path)
    assert found.run(LOAD).status == "ok"
    yield found
    found.shutdown()


@pytest.fixture(scope="module")
def lasting(started_home: Callable[[], Home], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """A kernel for tests that need no restart."""
    folder = tmp_path_factory.mktemp("lasting")
    found = Kernel(started_home().root, notebooks.write(folder / "n.ipynb", []), folder)
    found.run(LOAD)
    yield found
    found.shutdown()


@pytest.fixture
def shared(lasting: Kernel) -> Kernel:
    """The lasting kernel, at the beginning of a new run."""
    lasting.run("%reset -f")
    lasting.run("%durable new")
    return lasting


def restarted(kernel: Kernel) -> Reply:
    kernel.restart()
    return kernel.run(LOAD)


def the_run(home: Home) -> contract.RunDetail:
    client = Client(home)
    [run] = client.call(contract.LIST_RUNS, contract.ListRuns()).runs
    return client.call(contract.GET_RUN, contract.ByRun(run_id=run.id))


def details(home: Home, run_id: str) -> contract.RunDetail:
    return Client(home).call(contract.GET_RUN, contract.ByRun(run_id=run_id))


def test_a_step_runs_once_and_is_restored_after_a_restart(kernel: Kernel, home: Home) -> None:
    """Guarantees 1 and 7: restart, run all: every step restored, same variables, same outputs, a reason for each."""
    cells = [
        "%%step first\nimport random\nrows = [random.random() for _ in range(3)]\nalias = rows\nprint('first')\nrows",
        "%%step second\nalias.append('x')\ntotal = len(rows)\ndisplay({'text/plain': 'shown'}, raw=True)\ntotal * 2",
    ]
    first = [kernel.run(cell, f"c{i}") for i, cell in enumerate(cells)]
    assert [reply.status for reply in first] == ["ok", "ok"]
    assert "✓ first" in first[0].notes
    before = kernel.value("(rows, alias is rows, total)")
    assert "2 steps kept" in restarted(kernel).notes
    again = [kernel.run(cell, f"c{i}") for i, cell in enumerate(cells)]
    assert ["↺" in reply.notes and "same code and inputs" in reply.notes for reply in again] == [True, True]
    assert [reply.own for reply in again] == [reply.own for reply in first]
    assert kernel.value("(rows, alias is rows, total)") == before
    assert [(s.executions, s.restores) for s in the_run(home).steps] == [(1, 1), (1, 1)]


def test_whatever_ipython_runs_a_step_runs(kernel: Kernel) -> None:
    """Top-level await, `;`, other magics below, shell commands: run, kept, restored."""
    cells = {
        "%%step a\nimport asyncio\nawait asyncio.sleep(0)\na = 1": ("a", "1"),
        "%%step b\nb = 2;\nb;": ("b", "2"),
        "%%step c\n%%time\nc = 3": ("c", "3"),
        "%%step d\nd = !echo hello\nd = list(d)": ("d", "['hello']"),
        "%%step e\nimport os\nos.environ['X_Y'] = '1'\ne = %env X_Y": ("e", "'1'"),
        "\n\n%%step f\nf = 4": ("f", "4"),
        "%%step g\n# only a comment first\n\ng = 5": ("g", "5"),
        "%%step h\n%%capture caught\nprint('quiet')": ("caught.stdout", r"'quiet\n'"),
        "%%step i\nasync def f2():\n    return 6\ni = await f2()\ni": ("i", "6"),
    }
    for mark in ("✓", "↺"):
        for cell, (expression, expected) in cells.items():
            reply = kernel.run(cell)
            assert reply.status == "ok", reply.error
            assert mark in reply.notes, (cell, reply.notes)
            assert kernel.value(expression) == expected
        if mark == "✓":
            restarted(kernel)


def test_a_traceback_shows_the_cells_own_lines(shared: Kernel) -> None:
    """Line numbers of a step's body are the cell's own, and the traceback stands first, untouched."""
    reply = shared.run("%%step a\nx = 1\ny = 0\nx / y", "a")
    assert reply.status == "error"
    assert "ZeroDivisionError" in reply.error
    assert "line 4" in re.sub(r"\x1b\[[0-9;]*m", "", reply.error).replace("---> 4", "line 4")
    assert "%%step a" in reply.error
    assert "__nbdurable" not in reply.error
    assert "fix the cell and run it again" in reply.notes
    shared.run("%%step a\nx = 1\ny = 1\nx / y", "a")
    assert shared.value("y") == "1"


def test_a_syntax_error_is_the_users_own(shared: Kernel) -> None:
    reply = shared.run("%%step a\nx = 1\ny = = 2", "a")
    assert reply.content["ename"] == "SyntaxError"
    assert "3" in reply.error


def test_live_output_comes_while_the_step_runs(shared: Kernel) -> None:
    """What a step prints is seen before it ends."""
    sent = shared.send(
        "%%step a\nprint('early', flush=True)\nwhile True:\n    import time; time.sleep(0.05)", "a"
    )
    assert shared.client is not None
    while True:
        message = shared.client.get_iopub_msg(timeout=20)
        if message["msg_type"] == "stream":
            assert message["content"]["text"].startswith("early")
            break
    shared.interrupt()
    assert shared.collect(sent).content["ename"] == "KeyboardInterrupt"


def test_a_change_runs_the_step_and_says_which(kernel: Kernel) -> None:
    """Design §5: code, helpers, and the source of an input; the reason is said (guarantee 9)."""
    cases: list[tuple[list[str], str, str]] = [
        (["%%step a\na = 1"], "%%step a\na = 2", "its code changed"),
        (["def f():\n    return 1", "%%step b\nb = f()"], "def f():\n    return 2", "helper `f` changed"),
        (["n = 5", "%%step c\nc = n"], "n = 6", "its input `n`"),
        (["k = 5\nm = k + 1", "%%step d\nd = m"], "k = 6\nm = k + 1", "its input `m`"),
        (["%%step e\ne = 1", "%%step f\ny = e"], "%%step e\ne = 7", "its input `e`"),
    ]
    for cells, _, _ in cases:
        for cell in cells:
            assert kernel.run(cell).status == "ok"
    restarted(kernel)
    for cells, edited, reason in cases:
        notes = ""
        for cell in [edited, *cells[1:]]:
            reply = kernel.run(cell)
            assert reply.status == "ok", reply.error
            notes = reply.notes
        assert "✓" in notes
        assert reason in notes


def test_comments_and_moved_lines_change_nothing(kernel: Kernel) -> None:
    kernel.run("def f(a):\n    return a + 1", "h")
    kernel.run("%%step a\nx = f(1)", "a")
    restarted(kernel)
    kernel.run("# a helper\n\n\ndef f(a):  # adds\n    return a + 1", "h")
    assert "↺ a" in kernel.run("%%step a\n# the same\nx = f( 1 )", "a").notes


def test_drift_is_kept_on_the_first_visit_and_runs_afterwards(kernel: Kernel) -> None:
    """A value that comes out differently must not repeat an effect on resume; one that a person changes must."""
    clock = "import time\nnow = time.time_ns()"
    kernel.run(clock, "n")
    kernel.run("%%step a\nx = now", "a")
    kept = kernel.value("x")
    restarted(kernel)
    kernel.run(clock, "n")
    reply = kernel.run("%%step a\nx = now", "a")
    assert "↺ a" in reply.notes
    assert "`now` differs" in reply.notes
    assert kernel.value("x") == kept
    kernel.run(clock, "n")
    assert "✓ a" in kernel.run("%%step a\nx = now", "a").notes
    assert kernel.value("x") != kept


def test_on_drift_decides_otherwise(kernel: Kernel) -> None:
    clock = "import time\nnow = time.time_ns()"
    kernel.run(clock, "n")
    kernel.run("%%step a --on-drift rerun\nx = now", "a")
    kernel.run("%%step b --on-drift error\ny = now", "b")
    restarted(kernel)
    kernel.run(clock, "n")
    assert "✓ a" in kernel.run("%%step a --on-drift rerun\nx = now", "a").notes
    reply = kernel.run("%%step b --on-drift error\ny = now", "b")
    assert reply.status == "error"
    assert "%durable rerun b" in reply.error


def test_rerun_force_status_plan_new(kernel: Kernel, home: Home) -> None:
    """What a person tells the run: rerun, --force, status, plan, new."""
    cell = "%%step a\nx = 1"
    kernel.run(cell, "a")
    assert "↺ a" in kernel.run(cell, "a").notes
    assert "will run" in kernel.run("%durable rerun a").notes
    assert "✓ a" in kernel.run(cell, "a").notes
    assert "↺ a" in kernel.run(cell, "a").notes
    assert "✓ a" in kernel.run("%%step a --force\nx = 1", "a").notes
    assert "ran 3×, restored 2×" in kernel.run("%durable status").notes
    notebooks.write(home.root.parent / "n.ipynb", [("a", cell), ("b", "%%step b\ny = x")])
    plan = kernel.run("%durable plan").notes
    assert "restore" in plan
    assert "it has no checkpoint yet" in plan
    old = the_run(home)
    assert "begins" in kernel.run("%durable new").notes
    assert "✓ a" in kernel.run(cell, "a").notes
    runs = Client(home).call(contract.LIST_RUNS, contract.ListRuns()).runs
    assert [run.status for run in runs] == [RunStatus.RUNNING, RunStatus.COMPLETED]
    assert runs[1].id == old.id


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("%%step", "needs a name"),
        ("%%step a b\nx = 1", "one name, not 2"),
        ("%%step a --retry 3\nx = 1", "no option --retry"),
        ("%%step a --on-drift maybe\nx = 1", "invalid choice"),
        ("%%step a --save 1x\nx = 1", "not a variable's name"),
        ("%%step a/b\nx = 1", "can't be a step's name"),
        ("%%step a", "has no code"),
        ("%%step a\n\n# nothing", "has no code"),
        ("# first\n%%step a\nx = 1", "move it to the cell's first line"),
        ("%durable frobnicate", "no word 'frobnicate'"),
        ("%durable rerun nothing", "no step `nothing`"),
    ],
)
def test_bad_input_gets_one_clear_error(shared: Kernel, cell: str, message: str) -> None:
    """Guarantee 11: one clear error, no traceback of ours, and the kernel goes on."""
    reply = shared.run(cell, "a")
    assert reply.status == "error"
    assert message in reply.error
    assert "Traceback" not in reply.error
    assert "nbdurable/" not in reply.error
    assert shared.run("%%step fine\nz = 1", "f").status == "ok"


def test_a_step_inside_a_cell_is_refused(shared: Kernel) -> None:
    """Guarantee 11: the reason, instead of a NameError of ours; the outer step is kept."""
    cell = "%%step a\nfound = get_ipython().run_cell('%%step b\\nx = 1').error_in_exec\nsaid = str(found)\ndel found"
    assert "✓ a" in shared.run(cell, "a").notes
    assert "cell of its own" in shared.value("said")


def test_a_step_is_explained_and_completed(kernel: Kernel) -> None:
    """Guarantee 11: `%%step?` tells the options, <Tab> finds the word, and without the extension it says so."""
    assert "--on-drift" in str(kernel.run("%%step?").content["payload"])
    assert kernel.client is not None
    reply = kernel.client.complete("%%ste", reply=True, timeout=20)
    assert "%%step" in reply["content"]["matches"]
    kernel.run("%unload_ext nbdurable")
    assert "%load_ext nbdurable" in kernel.run("%%step a\nx = 1", "a").error
    assert "no open run" in kernel.run(LOAD).notes
    assert "✓ a" in kernel.run("%%step a\nx = 1", "a").notes


def test_two_cells_of_one_name_are_refused(kernel: Kernel, tmp_path: Path) -> None:
    notebooks.write(tmp_path / "n.ipynb", [("one", "%%step a\nx = 1"), ("two", "%%step a\nx = 2")])
    kernel.run("%%step a\nx = 1", "one")
    reply = kernel.run("%%step a\nx = 2", "two")
    assert reply.status == "error"
    assert "two cells" in reply.error
    notebooks.write(tmp_path / "n.ipynb", [("two", "%%step a\nx = 2")])
    assert kernel.run("%%step a\nx = 2", "two").status == "ok"


def test_what_cannot_be_saved_is_named_at_once_and_after_a_restore(kernel: Kernel) -> None:
    """Guarantee 7: never a silently different value."""
    cell = "%%step a\nlines = (i for i in range(3))\nfine = 1"
    reply = kernel.run(cell, "a")
    assert "lines not saved" in reply.notes
    restarted(kernel)
    assert "lines not saved" in kernel.run(cell, "a").notes
    assert kernel.value("fine") == "1"
    reply = kernel.run("list(lines)")
    assert reply.status == "error"
    assert "lines" in reply.error


def test_save_and_no_save(kernel: Kernel) -> None:
    kernel.run("outside = [1]")
    cell = "%%step a --save outside --no-save scratch\nscratch = 'x' * 10\nkept = 1"
    reply = kernel.run(cell, "a")
    assert "scratch not saved: left out by --no-save" in reply.notes
    restarted(kernel)
    kernel.run(cell, "a")
    assert kernel.value("(outside, kept)") == "([1], 1)"


def test_deletions_random_state_functions_and_classes_come_back(kernel: Kernel) -> None:
    kernel.run("doomed = 1\nimport random\nrandom.seed(3)")
    cell = (
        "%%step a\ndel doomed\nscale = 3\ndef times(x):\n    return x * scale\nclass Point:\n"
        "    def __init__(self, x):\n        self.x = x\n    def moved(self):\n        return times(self.x)\n"
        "p = Point(2)\nr = random.random()"
    )
    assert kernel.run(cell, "a").status == "ok"
    expected = kernel.value("random.random()")
    restarted(kernel)
    kernel.run("doomed = 1\nimport random\nrandom.seed(3)")
    assert "↺" in kernel.run(cell, "a").notes
    assert kernel.value("'doomed' in globals()") == "False"
    assert kernel.value("random.random()") == expected
    assert kernel.value("(p.moved(), isinstance(p, Point), type(p) is Point)") == "(6, True, True)"
    kernel.run("scale = 5")
    assert kernel.value("p.moved()") == "10"


def test_figures_and_progress_are_replayed(kernel: Kernel) -> None:
    pytest.importorskip("matplotlib")
    cell = (
        "%%step a\n%matplotlib inline\nimport matplotlib.pyplot as plt\nfrom IPython.display import display, HTML\n"
        "h = display(HTML('<b>0</b>'), display_id=True)\nh.update(HTML('<b>1</b>'))\nplt.plot([1, 2]);"
    )
    first = kernel.run(cell, "a")
    assert any("image/png" in output.get("data", {}) for output in first.own), first.error
    restarted(kernel)
    again = kernel.run(cell, "a")
    assert "↺" in again.notes
    assert [o.get("data") for o in again.own] == [o.get("data") for o in first.own]


def test_a_widget_takes_no_other_variable_down(kernel: Kernel) -> None:
    """A widget reaches the kernel, and so every variable; only it is not saved (guarantee 7: refused by name)."""
    cells = [
        "%%step a\nimport ipywidgets\nout = ipywidgets.Output()\nshell = get_ipython()",
        "%%step b\nclass Point:\n    x = 1\np = Point()\np.out = [1]\nsame = p.out\ndouble = lambda x: 2 * x",
        "%%step c\n@ipywidgets.interact(x=(0, 5))\ndef square(x=2):\n    return x * x",
    ]
    a, b, c = (kernel.run(cell, f"c{i}").notes for i, cell in enumerate(cells))
    assert "out not saved: a widget" in a
    assert "shell not saved: a part of Jupyter" in a
    assert "not saved" not in b
    assert "square not saved: `square['widget']`: a widget" in c
    restarted(kernel)
    for i, cell in enumerate(cells):
        assert "↺" in kernel.run(cell, f"c{i}").notes
    assert kernel.value("(p.x, p.out is same, double(4))") == "(1, True, 8)"


def test_what_an_earlier_cells_task_prints_is_not_the_steps(kernel: Kernel) -> None:
    """Guarantee 6: what stands below the cell that started a task is replayed nowhere else; a thread's prints are."""
    plain = (
        "import asyncio, threading\nasync def murmur():\n    await asyncio.sleep(0)\n    print('task')\n"
        "task = asyncio.ensure_future(murmur())"
    )
    cell = (
        "%%step a\nt = threading.Thread(target=print, args=['thread'])\nt.start()\nt.join()\ndel t\n"
        "await task\nprint('own')"
    )
    for mark in ("✓ a", "↺ a"):
        kernel.run(plain)
        reply = kernel.run(cell, "a")
        assert reply.status == "ok", reply.error
        assert mark in reply.notes
        assert reply.text == "thread\nown\n"
        restarted(kernel)


def test_widgets_are_replayed_as_the_text_that_they_came_to_show(kernel: Kernel) -> None:
    """A progress bar has run to its end; one that closed itself is not shown again; no widget is promised."""
    cell = (
        "%%step a\nfrom tqdm.notebook import tqdm\nimport ipywidgets\nfor i in tqdm(range(4)): pass\n"
        "for i in tqdm(range(4), leave=False): pass\ndisplay(ipywidgets.IntSlider(value=7))"
    )
    assert kernel.run(cell, "a").status == "ok"
    restarted(kernel)
    first, second = kernel.run(cell, "a").own
    assert "100%" in first["data"]["text/plain"]
    assert "4/4" in first["data"]["text/plain"]
    assert second["data"] == {"text/plain": "IntSlider(value=7)"}


def test_a_renamed_notebook_keeps_its_run(kernel: Kernel, home: Home, tmp_path: Path) -> None:
    """Guarantee 1: the run follows its notebook under another name; a copy begins a run of its own."""
    cell = "%%step a\nx = 1"
    old, new = tmp_path / "n.ipynb", tmp_path / "m.ipynb"
    notebooks.write(old, [("a1b2", cell)])
    kernel.run(cell, "a1b2")
    notebooks.write(new, [("a1b2", cell)])
    copied = Kernel(home.root, new, tmp_path)
    assert "no open run" in copied.run(LOAD).notes
    copied.shutdown()
    old.unlink()
    kernel.shutdown()
    renamed = Kernel(home.root, new, tmp_path)
    try:
        assert "m.ipynb (was n.ipynb)" in renamed.run(LOAD).notes
        assert "↺ a" in renamed.run(cell, "a1b2").notes
        assert the_run(home).notebook == str(new)
    finally:
        renamed.shutdown()


def test_vs_code_names_the_notebook_in_the_namespace(home: Home, coordinator: Any, tmp_path: Path) -> None:
    """VS Code sets no environment: the run is that of the path in `__vsc_ipynb_file__`."""
    path = notebooks.write(tmp_path / "v.ipynb", [])
    kernel = Kernel(home.root, None, tmp_path)
    try:
        for mark in ("✓ a", "↺ a"):
            kernel.run(f"__vsc_ipynb_file__ = {str(path)!r}")
            assert "v.ipynb" in kernel.run(LOAD).notes
            assert mark in kernel.run("%%step a\nx = 1", "vscode-notebook-cell:/v.ipynb#W0").notes
            assert the_run(home).notebook == str(path)
            kernel.restart()
    finally:
        kernel.shutdown()


def test_a_second_kernel_is_told_and_may_take_over(kernel: Kernel, home: Home, tmp_path: Path) -> None:
    """Guarantee 4: a run has one driver; the one whose turn has passed changes nothing."""
    kernel.run("%%step a\nx = 1", "a")
    second = Kernel(home.root, tmp_path / "n.ipynb", tmp_path)
    try:
        told = second.run(LOAD)
        assert f"kernel {kernel.pid}" in told.notes
        assert "%durable takeover" in told.notes
        refused = second.run("%%step a\nx = 1", "a")
        assert refused.status == "error"
        assert "%durable takeover" in refused.error
        assert "driven by" in second.run("%durable status").notes
        assert "1 step kept" in second.run("%durable takeover").notes
        assert "↺ a" in second.run("%%step a\nx = 1", "a").notes
        late = kernel.run("%%step b\ny = 1", "b")
        assert late.status == "error"
        assert "driven by" in late.error
        assert "goes on without this kernel" in kernel.run("%durable new").notes
        runs = Client(home).call(contract.LIST_RUNS, contract.ListRuns()).runs
        assert [len(run.steps) for run in (details(home, r.id) for r in runs)] == [0, 1]
    finally:
        second.shutdown()


def test_the_coordinator_may_die_between_cells_and_within_them(kernel: Kernel, coordinator: Any) -> None:
    """Guarantee 3, and design §7: a run does not fail because the coordinator was restarted."""
    kernel.run("%%step a\nx = 1", "a")
    coordinator.kill()
    assert "✓ b" in kernel.run("%%step b\ny = x + 1", "b").notes
    cell = f"%%step c\nimport os, signal\nos.kill({coordinator.pid}, signal.SIGKILL)\nz = 3"
    reply = kernel.run(cell, "c")
    assert reply.status == "ok", reply.error
    restarted(kernel)
    for step in ("%%step a\nx = 1", "%%step b\ny = x + 1", cell):
        assert "↺" in kernel.run(step).notes
    assert kernel.value("(x, y, z)") == "(1, 2, 3)"


def test_an_altered_blob_and_a_missing_one_are_refused(kernel: Kernel, home: Home) -> None:
    """Guarantee 8, and bad input: the error names the blob and what to do; the step can run again."""
    cell = "%%step a\nbig = bytes(range(256)) * 400"
    kernel.run(cell, "a")
    [blob] = [p for p in home.blobs.rglob("*") if p.is_file()]
    blob.chmod(0o600)
    data = bytearray(blob.read_bytes())
    data[100] ^= 1
    blob.write_bytes(data)
    restarted(kernel)
    reply = kernel.run(cell, "a")
    assert reply.status == "error"
    assert blob.name in reply.error
    assert "%durable rerun a" in reply.error
    blob.unlink()
    assert "missing" in kernel.run(cell, "a").error
    kernel.run("%durable rerun a")
    assert "✓ a" in kernel.run(cell, "a").notes


def test_one_request_restores_all_that_needs_no_code(kernel: Kernel, home: Home) -> None:
    """Guarantees 1, 6, 7 and 9, as the runner asks for it: in order, each cell's outputs between marks, up to an edit.

    A thread of the notebook's may change a value in between: then inputs are looked at, and the change is said.
    """
    cells = {
        "a": "%%step a\nrows = [1]\nprint('first')\nrows",
        "b": "%%step b\nawait __import__('asyncio').sleep(0)\nmore = rows + [2]\nprint('second')",
        "c": "%%step c\ntotal = sum(more)\ndisplay({'text/plain': 'third'}, raw=True)",
        "d": "%%step d\nlast = total",
    }
    first = {name: kernel.run(source, name) for name, source in cells.items()}
    restarted(kernel)
    sent = [*(cells | {"d": "%%step d\nlast = total + 1"}).items()]
    code = f"__import__('nbdurable.kernel.ahead', fromlist=['_']).bring_back({sent!r})"
    assert kernel.client is not None
    waiting = kernel.client.execute(code, silent=True, store_history=False)
    reply = kernel.collect(waiting)
    assert reply.status == "ok", reply.error
    parts: dict[str, list[Any]] = {}
    ended: list[dict[str, Any]] = []
    for output in reply.own:
        mark = output.get("data", {}).get(contract.CELL_MARK)
        if mark is None:
            parts[next(reversed(parts))].append(output)
            continue
        if mark["ended"]:
            ended.append(mark["ended"])
        if mark["begins"]:
            parts[mark["begins"]] = []
    assert [one["cell"] for one in ended] == ["a", "b", "c"]
    assert [one["execution_count"] for one in ended] == [2, 3, 4]
    assert parts == {
        name: [{**o, "execution_count": 2} if "execution_count" in o else o for o in first[name].own]
        for name in ("a", "b", "c")
    }
    assert kernel.value("(rows, more, total, 'await' in In[3], 'last' in globals())") == (
        "([1], [1, 2], 3, True, False)"
    )
    reasons = [step.reason for step in the_run(home).steps][:3]
    assert reasons == ["same code and inputs"] * 3
    assert "its code changed" in kernel.run(sent[3][1], "d").notes


def test_what_the_notebook_may_run_meanwhile_is_seen(kernel: Kernel) -> None:
    """Guarantee 9: inputs are taken as recorded only where no thread, hook or signal handler of the notebook is."""
    kernel.run("from nbdurable.kernel import ahead, session")
    alone = "ahead._is_alone(session.current())"
    assert kernel.value(alone) == "True"
    for begin, end in (
        ("import threading; done = threading.Event(); t = threading.Thread(target=done.wait); t.start()",
         "done.set(); t.join()"),
        ("import _thread; lock = _thread.allocate_lock(); lock.acquire()\n"
         "_thread.start_new_thread(lambda: lock.acquire(), ())",
         "lock.release()\nwhile len(sys._current_frames()) > known: pass"),
        ("def hook(*_): pass\nget_ipython().events.register('post_execute', hook)",
         "get_ipython().events.unregister('post_execute', hook)"),
        ("import signal; before = signal.signal(signal.SIGUSR1, lambda *_: None)",
         "signal.signal(signal.SIGUSR1, before)"),
    ):  # fmt: skip
        kernel.run("import sys; known = len(sys._current_frames())")
        assert kernel.run(begin).status == "ok"
        assert kernel.value(alone) == "False", begin
        assert kernel.run(end).status == "ok"
        assert kernel.value(alone) == "True", end


def answer(home: Home, wait_id: str, **more: Any) -> None:
    question = contract.AnswerWait(
        wait_id=wait_id, **{"approved": True, "by": "test", "nonce": wait_id, **more}
    )
    Client(home).call(contract.ANSWER_WAIT, question)


def open_waits(home: Home) -> tuple[Any, ...]:
    return Client(home).call(contract.LIST_WAITS, contract.ListWaits()).waits


def until(condition: Callable[[], Any], client: Client) -> Any:
    """Wait for a condition; the coordinator's long poll is the clock."""
    for _ in range(150):
        if found := condition():
            return found
        client.call(contract.LEASE_WORK, never_work())
    raise AssertionError("it did not come true")


def never_work() -> contract.LeaseWork:
    from nbdurable.models import Driver, DriverKind
    from nbdurable.processes import identity

    return contract.LeaseWork(
        driver=Driver(kind=DriverKind.HEADLESS, process=identity("worker")), slots=0, hold_s=0.1
    )


APPROVAL = (
    "%%step gate\nbefore = globals().get('before', 0) + 1\ndraft = 'text'\n"
    "decision = durable.approve(draft, title='Publish?')\nafter = (decision.value, decision.by)"
)


def test_an_interactive_approval_waits_and_goes_on(kernel: Kernel, home: Home) -> None:
    """Guarantee 5: any route answers; the card then says who decided."""
    kernel.run("import nbdurable as durable")
    sent = kernel.send(APPROVAL, "g")
    [wait] = until(lambda: open_waits(home), Client(home))
    assert wait.preview == "text"
    answer(home, wait.id, value="edited", edited=True, comment="shorter")
    reply = kernel.collect(sent)
    assert reply.status == "ok", reply.error
    assert kernel.value("(before, after)") == "(1, ('edited', 'test'))"
    card = next(o for o in reply.own if "text/html" in o["data"])
    assert "approved with edits by test" in card["data"]["text/plain"]
    assert "shorter" in card["data"]["text/html"]


def test_an_interrupt_reaches_a_long_await(shared: Kernel) -> None:
    """A step that awaits something for minutes can be interrupted, as one that computes can."""
    sent = shared.send("%%step a\nimport asyncio\nprint('begun', flush=True)\nawait asyncio.sleep(50)", "a")
    assert shared.client is not None
    while shared.client.get_iopub_msg(timeout=20)["msg_type"] != "stream":
        pass
    shared.interrupt()
    reply = shared.collect(sent, timeout=20)
    assert reply.content["ename"] in ("CancelledError", "KeyboardInterrupt")
    assert "did not finish" in reply.notes


def test_an_interrupt_during_a_commit_comes_after_it(kernel: Kernel) -> None:
    """Guarantee 2: what was being committed is kept whole; the cells that were queued behind it do not run."""
    cell = (
        "%%step a\nimport os, signal\n"
        "class Pressing:\n    def __reduce__(self):\n        if not os.path.exists('pressed'):\n"
        "            open('pressed', 'w').close()\n            os.kill(os.getpid(), signal.SIGINT)\n"
        "        return (int, ())\nx = Pressing()\ny = 2"
    )
    interrupted = kernel.send(cell, "a")
    queued = kernel.send("ran = 1")
    reply = kernel.collect(interrupted)
    assert reply.content["ename"] == "KeyboardInterrupt"
    assert "kept" in reply.error
    assert "✓ a" in reply.notes
    assert kernel.collect(queued).status == "aborted"
    assert kernel.value("'ran' in globals()") == "False"
    restarted(kernel)
    assert "↺ a" in kernel.run(cell, "a").notes
    assert kernel.value("y") == "2"


def test_an_interrupted_approval_stays_open_and_the_next_run_picks_it_up(kernel: Kernel, home: Home) -> None:
    """Interruptible; what came before the gate is not done again."""
    kernel.run("import nbdurable as durable")
    sent = kernel.send(APPROVAL, "g")
    [wait] = until(lambda: open_waits(home), Client(home))
    kernel.interrupt()
    reply = kernel.collect(sent, timeout=10)
    assert reply.content["ename"] == "KeyboardInterrupt"
    assert (
        reply.error
        == f"KeyboardInterrupt: approval {wait.id} stays open; run the cell again to wait for the answer"
    )
    assert "above its gate is kept" in reply.notes
    assert [w.id for w in open_waits(home)] == [wait.id]
    assert the_run(home).steps[0].status is StepStatus.WAITING
    answer(home, wait.id)
    reply = kernel.run(APPROVAL, "g")
    assert reply.status == "ok", reply.error
    assert kernel.value("(before, after)") == "(1, ('text', 'test'))"
    assert the_run(home).steps[0].status is StepStatus.COMPLETED


def test_an_edited_cell_asks_anew_and_its_old_approval_is_cancelled(kernel: Kernel, home: Home) -> None:
    """Nobody is asked for an answer that nothing would use."""
    kernel.run("import nbdurable as durable")
    sent = kernel.send(APPROVAL, "g")
    [old] = until(lambda: open_waits(home), Client(home))
    kernel.interrupt()
    kernel.collect(sent)
    sent = kernel.send(APPROVAL.replace("'text'", "'another text'"), "g")
    [new] = until(lambda: [w for w in open_waits(home) if w.id != old.id], Client(home))
    assert [w.id for w in open_waits(home)] == [new.id]
    answer(home, new.id)
    assert kernel.collect(sent).status == "ok"
    assert kernel.value("decision.value") == "'another text'"


def test_a_gate_survives_the_kernel(kernel: Kernel, home: Home) -> None:
    """Guarantees 5 and 6: killed while it waits, answered meanwhile, the cell goes on behind the gate."""
    kernel.run("import nbdurable as durable")
    kernel.send(APPROVAL, "g")
    [wait] = until(lambda: open_waits(home), Client(home))
    kernel.kill()
    answer(home, wait.id)
    restarted(kernel)
    kernel.run("import nbdurable as durable\nbefore = 10")
    reply = kernel.run(APPROVAL, "g")
    assert reply.status == "ok", reply.error
    assert kernel.value("(before, after)") == "(1, ('text', 'test'))"


def test_several_gates_in_one_cell_and_in_a_loop(kernel: Kernel, home: Home) -> None:
    kernel.run("import nbdurable as durable")
    cell = (
        "%%step gates\nseen = []\nfor i in range(2):\n    seen.append(durable.approve(i, title=f'number {i}').value)\n"
        "last = durable.approve('end').approved"
    )
    sent = kernel.send(cell, "g")
    for title in ("number 0", "number 1", "Approve?"):
        [wait] = until(lambda: open_waits(home), Client(home))
        assert wait.title == title
        answer(home, wait.id, approved=title != "Approve?")
        until(lambda wait=wait: wait.id not in [w.id for w in open_waits(home)], Client(home))
    assert kernel.collect(sent).status == "ok"
    assert kernel.value("(seen, last)") == "([0, 1], False)"


def test_a_gate_in_a_loop_survives_the_kernel(kernel: Kernel, home: Home) -> None:
    """Guarantee 6: the statement that holds the gate begins again as it began, with nothing in it twice."""
    cell = (
        "%%step gates\nseen = []\nprint('above')\nfor i in range(3):\n    seen.append('asked')\n"
        "    print('in the loop', i)\n    seen.append(durable.approve(i, title=f'number {i}').value)"
    )
    kernel.run("import nbdurable as durable")
    kernel.send(cell, "g")
    for number in range(2):
        [wait] = until(lambda: open_waits(home), Client(home))
        assert wait.title == f"number {number}"
        answer(home, wait.id)
        until(lambda wait=wait: wait.id not in [w.id for w in open_waits(home)], Client(home))
    [last] = until(lambda: open_waits(home), Client(home))
    kernel.kill()
    answer(home, last.id)
    restarted(kernel)
    kernel.run("import nbdurable as durable")
    reply = kernel.run(cell, "g")
    assert reply.status == "ok", reply.error
    assert kernel.value("seen") == "['asked', 0, 'asked', 1, 'asked', 2]"
    assert reply.text == "above\nin the loop 0\nin the loop 1\nin the loop 2\n"


def test_awaitable_gates_and_sleep(shared: Kernel) -> None:
    shared.run("import nbdurable as durable")
    cell = (
        "%%step g\nimport asyncio\nticks = 0\nasync def tick():\n    global ticks\n    while True:\n"
        "        ticks += 1\n        await asyncio.sleep(0.01)\ntask = asyncio.ensure_future(tick())\n"
        "await durable.sleep_async('300ms')\ntask.cancel()\ndel task\ndurable.sleep(0.1)\nok = ticks > 3"
    )
    reply = shared.run(cell, "g")
    assert reply.status == "ok", reply.error
    assert shared.value("ok") == "True"


def test_without_the_extension_a_gate_says_what_to_do(home: Home, tmp_path: Path) -> None:
    kernel = Kernel(home.root, tmp_path / "n.ipynb", tmp_path)
    try:
        reply = kernel.run("import nbdurable\nnbdurable.approve(1)")
        assert "%load_ext nbdurable" in reply.error
        assert "Traceback" not in reply.error
    finally:
        kernel.shutdown()


def test_plain_ipython_works(home: Home, coordinator: Any, tmp_path: Path) -> None:
    """In plain IPython, too: a step runs, and is restored by the next session in the folder."""
    code = (
        "from IPython.terminal.interactiveshell import TerminalInteractiveShell\n"
        "shell = TerminalInteractiveShell.instance()\n"
        "for cell in ('%load_ext nbdurable', '%%step a\\nx = 41\\nprint(\"ran\")\\nx + 1', 'print(\"x is\", x)'):\n"
        "    shell.run_cell(cell, store_history=True)\n"
    )
    outputs = [
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    for output, mark in zip(outputs, ("✓ a", "↺ a"), strict=True):
        assert mark in output.stdout, output.stdout + output.stderr
        assert "ran" in output.stdout
        assert "42" in output.stdout
        assert "x is 41" in output.stdout
