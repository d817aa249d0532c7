"""The command line as it is typed: help, parameters, wrong usage. No coordinator is started here."""

from __future__ import annotations

import datetime
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from nbdurable.cli import parameters, project
from nbdurable.cli.commands import app
from nbdurable.errors import ParameterError
from nbdurable.settings import find_home

COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test has a project without state, in its own folder."""
    monkeypatch.setenv("NBDURABLE_HOME", str(tmp_path / ".nbdurable"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / ".nbdurable"


WANTED = [
    "answer",
    "approve",
    "cancel",
    "demo",
    "diff",
    "doctor",
    "down",
    "fork",
    "gc",
    "logs",
    "ls",
    "plan",
    "reject",
    "repair",
    "replay",
    "resample",
    "resume",
    "run",
    "send",
    "show",
    "sql",
    "stats",
    "trust",
    "up",
    "waits",
    "worker",
]


def test_the_commands_are_those_of_the_design() -> None:
    """Design §6 and the issues: these and no fewer."""
    assert WANTED == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_with_an_example(command: str) -> None:
    """Guarantee 11 begins before the mistake: `--help` says what, and shows how."""
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"Example: nbdurable {command}" in result.stdout


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("-3", -3),
        ("2.5", 2.5),
        ("1e3", 1000.0),
        ("True", True),
        ("true", True),
        ("None", None),
        ("null", None),
        ("solid state batteries", "solid state batteries"),
        ("What is this: a test?", "What is this: a test?"),
        ("# not a comment", "# not a comment"),
        ("12:30", "12:30"),
        ("no", "no"),
        ("2026-11-22", "2026-11-22"),
        ("[1, 2]", [1, 2]),
        ('{"a": null}', {"a": None}),
        ('"42"', "42"),
        ("nan", "nan"),
        ("Infinity", "Infinity"),
        ("", ""),
        ("[" * 100_000, "[" * 100_000),
    ],
)
def test_a_word_becomes_the_value_that_papermill_makes_of_it(text: str, value: object) -> None:
    """Numbers, True, None as in papermill; JSON as well; everything else, dates too, is text as typed."""
    found = parameters.read_value(text)
    assert found == value
    assert type(found) is type(value)


@given(st.text())
def test_any_text_is_a_value(text: str) -> None:
    """Guarantee 11: there is no word that a parameter chokes on."""
    parameters.read_value(text)


@pytest.mark.parametrize(
    ("words", "joined"),
    [
        (
            ["nb.ipynb", "-p", "a", "1", "-p", "b", "two words"],
            ["nb.ipynb", "--parameter=a=1", "--parameter=b=two words"],
        ),
        (["-p", "a=1", "nb.ipynb"], ["--parameter=a=1", "nb.ipynb"]),
        (["-p", "expression", "x=1"], ["--parameter=expression=x=1"]),
        (["-p", "a", "-5"], ["--parameter=a=-5"]),
        (["--", "-p", "a"], ["--", "-p", "a"]),
    ],
)
def test_p_takes_a_name_and_a_value(words: list[str], joined: list[str]) -> None:
    """`-p NAME VALUE` as papermill has it; a value may begin with a dash or hold an equals sign."""
    assert parameters.join_pairs(words) == joined


@pytest.mark.parametrize("words", [["-p"], ["-p", "a"]])
def test_p_without_a_value_is_wrong_usage(words: list[str]) -> None:
    """Guarantee 11: half a parameter is named as such."""
    with pytest.raises(ParameterError, match="needs a name and a value"):
        parameters.join_pairs(words)


def test_a_parameter_file_is_yaml(tmp_path: Path) -> None:
    """A date in it stays one, so that the run can turn it into ISO text."""
    file = tmp_path / "params.yaml"
    file.write_text("topic: batteries\nday: 2026-11-22\nlimits: [1, 2]\n")
    assert parameters.read_file(file) == {
        "topic": "batteries",
        "day": datetime.date(2026, 11, 22),
        "limits": [1, 2],
    }


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "1: x", "just text", "\x00"])
def test_a_damaged_parameter_file_is_named(tmp_path: Path, text: str) -> None:
    """Guarantee 11: what is no mapping of names is refused with the file's name."""
    file = tmp_path / "params.yaml"
    file.write_text(text)
    with pytest.raises(ParameterError, match=r"params\.yaml"):
        parameters.read_file(file)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "nb.ipynb", "-p", "1a", "x"], "'1a' can't be the name of a parameter"),
        (["run", "nb.ipynb", "-p", "a"], "-p needs a name and a value"),
        (["run", "nb.ipynb", "-f", "missing.yaml"], "missing.yaml can't be read"),
        (["run", "nb.ipynb", "--steps", "some"], "--steps some"),
        (["run", "nb.ipynb", "--budget", "much"], "is no budget"),
        (["resume", "4fb29c1e", "--budget", "much"], "is no budget"),
        (["run", "missing.ipynb"], "there is no notebook"),
        (["run", "."], "is a folder"),
        (["run"], "Missing argument"),
        (["ls", "--status", "asleep"], "asleep"),
        (["ls", "--limit", "many"], "--limit"),
        (["frobnicate"], "frobnicate"),
        (["show", "4fb29c1e"], "nothing has run here yet"),
        (["approve", "7K2MXD", "--value", "{broken"], "--value is not JSON"),
    ],
)
def test_wrong_usage_is_one_clear_message_and_status_2(words: list[str], said: str, empty_home: Path) -> None:
    """Guarantee 11: what happened, to which object; nothing on stdout, nothing started, no traceback."""
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert not empty_home.exists()


@pytest.mark.parametrize("command", ["ls", "waits"])
def test_where_nothing_has_run_lists_are_empty(command: str, empty_home: Path) -> None:
    """A list of nothing is a list, and asking for it starts nothing."""
    result = CliRunner().invoke(app, [command, "--json"])
    assert (result.exit_code, result.stdout.strip()) == (0, "[]")
    assert not empty_home.exists()


def test_hints_name_the_home_that_the_shell_does_not_know(tmp_path: Path) -> None:
    """A command that is printed works from where the user stands."""
    project.choose_home(None)
    assert project.hint(find_home())("approve 7K2MXD") == "nbdurable approve 7K2MXD"
    project.choose_home(tmp_path / "else where")
    assert project.hint(find_home())("approve 7K2MXD") == "nbdurable --home 'else where' approve 7K2MXD"


def test_importing_the_commands_is_cheap() -> None:
    """Only Typer: what a command needs is imported when it is used."""
    heavy = "rich.console papermill nbformat panel pandas numpy duckdb fastapi uvicorn psutil yaml"
    code = f"import sys, nbdurable.cli; print([m for m in {heavy.split()} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_ctrl_c_while_the_commands_are_loaded_shows_no_traceback() -> None:
    """Guarantee 11: half a second of imports is long enough to think better of it."""
    code = (
        "import signal, sys\n"
        "class Impatience:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'nbdurable.cli.commands':\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Impatience())\n"
        "from nbdurable.cli import main\n"
        "main(['ls'])\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (130, "", "")
