"""How a `%%step` cell becomes code (design §5, findings §2)."""

import ast

import pytest
from IPython.core.inputtransformer2 import TransformerManager

from nbdurable.errors import StepUsageError
from nbdurable.kernel.rewrite import is_setup, may_wait, rewrite_lines, take_marker
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
    ],
)
def test_step_lines_read(line: str, options: StepOptions) -> None:
    assert parse_step_line(line) == options


@pytest.mark.parametrize("option", ["--force", "--save a", "--no-save a", "--on-drift keep", "--watch a"])
def test_replay_refuses_options_that_mean_nothing_with_it(option: str) -> None:
    """Guarantee 11: a cell that runs in every attempt and saves nothing leaves nothing for them to say."""
    with pytest.raises(StepUsageError, match=f"{option.split()[0]} means nothing with --replay"):
        parse_step_line(f"%%step a --replay {option}")


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
