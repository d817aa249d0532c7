"""How a `%%step` cell becomes code (design §5, findings §2)."""

import ast
import traceback
from typing import Any

import pytest
from IPython.core.inputtransformer2 import TransformerManager

from nbdurable.errors import StepUsageError
from nbdurable.kernel.rewrite import HOOK, in_attempts, is_setup, may_wait, rewrite_lines, take_marker
from nbdurable.policies import Retry
from nbdurable.stepline import StepOptions, is_step, parse_step_line, read_step


def transformed(source: str) -> str:
    manager = TransformerManager()
    manager.cleanup_transforms.append(rewrite_lines)
    return manager.transform_cell(source)


@pytest.mark.parametrize(
    ("line", "options"),
    [
        ("%%step a", StepOptions("a")),
        ("%%step  größe-2.b  ", StepOptions("größe-2.b")),
        ("%%step a --force --on-drift rerun", StepOptions("a", on_drift="rerun", force=True)),
        ("%%step --save x,y a --no-save z", StepOptions("a", save=frozenset("xy"), no_save=frozenset("z"))),
        (
            "%%step a --watch 'my data.csv,parts/*.parquet' --watch env:MODE,my\\ data.csv",
            StepOptions("a", watch=("my data.csv", "parts/*.parquet", "env:MODE")),
        ),
        ("%%step a --replay", StepOptions("a", replay=True)),
        (
            "%%step a --retries 3 --backoff 1.5 --min-wait 2m --retry-on KeyError,http.Error --on-exhausted pause",
            StepOptions(
                "a",
                retry=Retry.of(3, backoff=1.5, min_wait=120, on_exhausted="pause"),
                retry_on=("KeyError", "http.Error"),
            ),
        ),
        ("%%step a --timeout '1h 30m'", StepOptions("a", timeout_s=5400.0)),
    ],
)
def test_step_lines_read(line: str, options: StepOptions) -> None:
    assert parse_step_line(line) == options


@pytest.mark.parametrize("option", ["--force", "--save a", "--no-save a", "--on-drift keep", "--watch a"])
def test_replay_refuses_options_that_mean_nothing_with_it(option: str) -> None:
    """Guarantee 11: a cell that runs in every attempt and saves nothing leaves nothing for them to say."""
    with pytest.raises(StepUsageError, match=f"{option.split()[0]} means nothing with --replay"):
        parse_step_line(f"%%step a --replay {option}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--retries -1", "retries can't be -1"),
        ("--retries 1001", "0 to 1000"),
        ("--retries few", "'few' is no whole number"),
        ("--retries 2.5", "'2.5' is no whole number"),
        ("--backoff 2", "--backoff means nothing without --retries"),
        ("--retries 1 --backoff nan", "backoff can't be nan"),
        ("--retries 1 --min-wait '5 minutes'", "'5 minutes' is no duration"),
        ("--retries 1 --min-wait 2m --max-wait 1m", "shorter than the shortest"),
        ("--retries 1 --retry-on 'Key Error'", "'Key Error' is not the name of an error"),
        ("--retries 1 --on-exhausted explode", "invalid choice: 'explode'"),
        ("--timeout 0s", "a timeout of 0"),
        ("--timeout soon", "--timeout: 'soon' is no duration"),
    ],
)
def test_a_policy_that_is_nonsense_is_refused_at_the_line(words: str, said: str) -> None:
    """Guarantee 11: before anything runs; a headless run reads the same line before it begins."""
    with pytest.raises(StepUsageError) as caught:
        read_step(f"%%step a {words}\nx = 1")
    assert said in str(caught.value)


class Tries:
    """Stands for what the kernel offers to a rewritten cell: its body fails so often."""

    def __init__(self, failures: int) -> None:
        self.trying, self.failures, self.unfinished, self.shown = self, failures, True, []

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        self.unfinished = error is not None
        self.failures -= 1
        return self.failures >= 0 and error is not None

    def due(self, statement: int) -> bool:
        return True

    def keep(self, value: Any) -> None:
        self.shown = [value]

    def show(self, value: Any) -> None:
        self.shown.append(value)

    def last(self) -> Any:
        return self.shown[0]


def tried(source: str, failures: int, interactivity: str = "last_expr") -> tuple[dict[str, Any], Any]:
    """Run a cell in tries; return its variables, and the value that IPython would display."""
    body = ast.parse(source).body
    tree = ast.Module(in_attempts([(0, body[:1]), (1, body[1:])], interactivity), type_ignores=[])
    tries = Tries(failures)
    values: dict[str, Any] = {HOOK: tries, "n": 0}
    *above, last = ast.fix_missing_locations(tree).body
    exec(compile(ast.Module(above, type_ignores=[]), "<cell>", "exec", dont_inherit=True), values)
    if isinstance(last, ast.Expr):
        return values, eval(compile(ast.Expression(last.value), "<cell>", "eval"), values)
    exec(compile(ast.Module([last], type_ignores=[]), "<cell>", "exec", dont_inherit=True), values)
    return values, tries.shown


def test_a_cell_in_tries_leaves_what_it_would_leave_without() -> None:
    """Names are the notebook's, the last expression is displayed once, and `__future__` may stand on top."""
    values, shown = tried(
        "from __future__ import annotations\nn += 1\nassert n > 2\ndef f(x: n): ...\nn * 2", 5
    )
    assert (values["n"], shown, values["f"].__annotations__) == (3, 6, {"x": "n"})
    assert tried("n = 1\nn;", 0)[1] == 1
    assert tried("n = 1\nn = 2", 0)[1] == []
    assert tried("n\nn + 1", 0, "all")[1] == [0, 1]
    assert tried("n\nn + 1", 0, "none")[1] == []


def test_a_try_that_is_the_last_fails_on_its_own_line() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        tried("n += 1\n\n1 / 0", 1)
    *_, last = traceback.extract_tb(caught.value.__traceback__)
    assert (last.filename, last.lineno) == ("<cell>", 3)


def test_what_only_a_loop_can_hold_is_left_to_ipython() -> None:
    body = ast.parse("n = 1\nbreak").body
    assert in_attempts([(0, body)], "last_expr") == body


def test_only_a_cell_that_awaits_itself_becomes_a_coroutine() -> None:
    def is_async(source: str) -> bool:
        mode = ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        body = compile(source, "<cell>", "exec", mode).body  # type: ignore[attr-defined]
        loop = in_attempts([(0, body)], "last_expr")[0]
        return any(isinstance(part, ast.AsyncWith) for part in loop.body)  # type: ignore[attr-defined]

    assert is_async("await f()")
    assert is_async("x = [y async for y in f()]")
    assert not is_async("async def f():\n    await g()")


def test_lines_keep_their_numbers() -> None:
    """A traceback's line numbers are the cell's own."""
    tree = ast.parse(transformed("%%step a\nx = 1\n\n\ny = 2"))
    assert take_marker(tree) == "%%step a"
    assert [node.lineno for node in tree.body] == [2, 5]


def test_magics_below_the_line_are_transformed() -> None:
    text = transformed("%%step a\n%%time\nx = !ls\nx")
    assert "run_cell_magic('time', '', 'x = !ls\\nx\\n')" in text
    assert "get_ipython().getoutput('ls')" in transformed("%%step a\nx = !ls")


@pytest.mark.parametrize(
    "source",
    [
        "x = 1",
        'text = """\n%%step a\n"""',
        "%%stepper a\nx",
        "%%step?",
        "# %%step a\nx = 1",
        "%%bash\n%%step a\n",
    ],
)
def test_other_cells_are_left_alone(source: str) -> None:
    assert "__nbdurable_step__" not in transformed(source)


@pytest.mark.parametrize(
    "above",
    ["# why", "x = 1", "%time y()", "x = !ls", "if x:\n    y()", "%%time", "len?", '"""doc"""', "await x"],
)
def test_a_step_line_below_others_is_refused(above: str) -> None:
    """Guarantee 11: where it surely is one, and not the text of something else."""
    source = f"{above}\n%%step a\nx = 1\n"
    said = f"line {source[: source.index('%%step')].count(chr(10)) + 1}"
    with pytest.raises(StepUsageError, match=said):
        rewrite_lines(source.splitlines(keepends=True))
    with pytest.raises(StepUsageError, match=said):
        read_step(source)


def test_a_console_does_not_take_the_first_line_for_the_whole_cell() -> None:
    manager = TransformerManager()
    manager.cleanup_transforms.append(rewrite_lines)
    assert manager.check_complete("%%step a\n")[0] == "incomplete"
    assert manager.check_complete("%%step a\nx = 1\n\n")[0] == "complete"


def test_is_step() -> None:
    assert [is_step(s) for s in ("%%step a\nx", "\n%%step a\nx", "%%steps a", "x\n%%step a")] == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import numpy as np", True),
        (
            "%matplotlib inline\nimport matplotlib.pyplot as plt\nplt.style.use('x')\nplt.rcParams['a.b'] = 3",
            True,
        ),
        ("'''About'''\nfrom os import path", True),
        ("import pandas as pd\ndf = pd.DataFrame()", False),
        ("import requests\nclient.post(1)", False),
        ("pd.set_option('a', 1)", False),
        ("x = 1", False),
        ("'only text'", False),
        ("import os\ndef f(): pass", False),
    ],
)
def test_cells_that_only_import_and_configure(source: str, expected: bool) -> None:
    """`--steps all` runs them in every attempt: what they do is state of libraries."""
    assert is_setup(ast.parse(transformed(source))) is expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("d = durable.approve(x)", True),
        ("for x in xs:\n    approve(x)", True),
        ("import nbdurable as nb; nb.sleep(3)", True),
        ("await later.approve_async(x)", True),
        ("time.sleep(3)", False),
        ("sleep(3)", False),
        ("review(x)", True),
        ("get_ipython().run_cell_magic('time', '', 'durable.approve(x)')", True),
        ("text = 'approve(x)'", False),
        ("x = 1", False),
    ],
)
def test_which_statements_may_wait(source: str, expected: bool) -> None:
    """Before each such statement a mark stands, at which a suspended step goes on."""
    import time

    import nbdurable

    values = {"durable": nbdurable, "approve": nbdurable.approve, "time": time, "sleep": time.sleep}
    assert any(may_wait(node, values, {"review"}) for node in ast.parse(source).body) is expected
