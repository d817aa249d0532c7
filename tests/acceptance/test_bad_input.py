"""Bad input, as issues 2 and 3 list it: one clear error each (guarantee 11), its exit status, and nothing lost.

`MATRIX` names for each item the tests that hold it, here or beside their kin; a test compares it with what there is.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import psutil
import pytest

from tests.tools import notebooks
from tests.tools.commands import Project
from tests.tools.processes import until

HERE = "acceptance/test_bad_input.py"
COMMANDS = "acceptance/test_commands.py"
KERNEL = "integration/test_kernel_steps.py"
KERNEL_TOO = "integration/test_kernel_bad_input.py"
NOTEBOOKS = "unit/test_notebooks.py"
PROCESS = "integration/test_coordinator_process.py"
MATRIX = {
    "unknown step option": [
        f"{KERNEL}::test_bad_input_gets_one_clear_error",
        f"{HERE}::test_a_step_cell_that_can_not_run_is_refused_before_the_run",
    ],
    "duplicate step name": [
        f"{KERNEL}::test_two_cells_of_one_name_are_refused",
        f"{NOTEBOOKS}::test_duplicate_step_names_both_cells",
        f"{HERE}::test_a_step_cell_that_can_not_run_is_refused_before_the_run",
    ],
    "%%step not on the first line": [
        "unit/kernel/test_rewrite.py::test_a_step_line_below_others_is_refused",
        f"{KERNEL}::test_bad_input_gets_one_clear_error",
        f"{HERE}::test_a_step_cell_that_can_not_run_is_refused_before_the_run",
    ],
    "empty body": [
        f"{KERNEL}::test_bad_input_gets_one_clear_error",
        f"{HERE}::test_a_step_cell_that_can_not_run_is_refused_before_the_run",
    ],
    "syntax error in the body": [
        f"{KERNEL}::test_a_syntax_error_is_the_users_own",
        f"{HERE}::test_a_syntax_error_is_shown_as_the_users_own",
    ],
    "notebook missing, not JSON, nbformat 3": [
        f"{COMMANDS}::test_bad_input_is_one_clear_message",
        f"{NOTEBOOKS}::test_what_is_no_notebook_is_refused",
    ],
    "no kernel of that name": [
        f"{COMMANDS}::test_bad_input_is_one_clear_message",
        f"{NOTEBOOKS}::test_unknown_kernel_lists_those_there_are",
    ],
    "unknown parameter": [
        f"{COMMANDS}::test_bad_input_is_one_clear_message",
        f"{NOTEBOOKS}::test_unknown_parameter_lists_those_there_are",
    ],
    "a parameter that is not JSON (a date must work)": [
        f"{NOTEBOOKS}::test_values_that_cannot_be_passed",
        f"{HERE}::test_a_date_is_a_parameter",
    ],
    "unwritable output": [
        f"{COMMANDS}::test_bad_input_is_one_clear_message",
        f"{NOTEBOOKS}::test_output_that_cannot_be_written_is_refused",
        f"{NOTEBOOKS}::test_names_that_are_too_long",
        "unit/test_engine.py::test_unwritable_output_is_an_error_that_says_so",
    ],
    "no space left: a blob": [
        "unit/checkpoint/test_blobs.py::test_no_space_is_said_and_leaves_nothing_behind",
        f"{KERNEL_TOO}::test_no_space_for_a_blob",
        f"{HERE}::test_no_space_fails_a_headless_run_which_then_goes_on",
    ],
    "no space left: the store": [
        "unit/store/test_durability.py::test_a_full_disk_refuses_with_its_name_and_work_goes_on_once_there_is_space",
        f"{KERNEL_TOO}::test_no_space_for_the_store",
        f"{HERE}::test_a_headless_run_outlasts_a_store_without_space",
    ],
    "no space left: the output notebook": [
        "unit/test_engine.py::test_failed_write_leaves_the_old_output",
        f"{HERE}::test_no_space_fails_a_headless_run_which_then_goes_on",
    ],
    "unknown run id": [f"{COMMANDS}::test_bad_input_is_one_clear_message"],
    "approving twice": [f"{COMMANDS}::test_an_approval_ends_the_command_and_an_answer_goes_on"],
    "approving with JSON that doesn't parse": [
        f"{COMMANDS}::test_an_approval_ends_the_command_and_an_answer_goes_on",
        "unit/cli/test_words.py::test_wrong_usage_is_one_clear_message_and_status_2",
    ],
    "a coordinator of another version": [
        f"{COMMANDS}::test_a_coordinator_of_another_version_is_named",
        f"{PROCESS}::test_another_version_may_end_the_coordinator",
        "integration/test_coordinator_api.py::test_another_version_is_told_both",
    ],
    "a stale socket, coordinator.json of a dead pid": [
        f"{PROCESS}::test_a_stale_socket_and_json_do_not_hinder",
        f"{PROCESS}::test_rubbish_in_the_json_does_not_hinder",
    ],
    "a token that doesn't match": [
        f"{COMMANDS}::test_a_token_that_does_not_match_is_named",
        f"{PROCESS}::test_a_token_that_does_not_match",
        f"{KERNEL_TOO}::test_a_coordinator_that_refuses_is_told_in_the_kernel",
    ],
    "a blob that is missing, truncated or altered": [
        "unit/checkpoint/test_blobs.py::test_a_damaged_blob_is_refused_by_name_and_replaced",
        f"{KERNEL}::test_an_altered_blob_and_a_missing_one_are_refused",
        f"{KERNEL_TOO}::test_a_truncated_blob_is_refused",
        f"{NOTEBOOKS}::test_a_snapshot_that_is_gone_is_named_as_such",
        f"{HERE}::test_a_damaged_blob_stops_a_resumed_run_and_put_back_it_goes_on",
    ],
    "a state folder or settings that can't be used": [
        f"{HERE}::test_a_state_folder_that_can_not_be_used_is_named",
        f"{HERE}::test_a_misspelt_setting_is_named",
        f"{KERNEL_TOO}::test_settings_that_can_not_be_used_are_told_in_the_kernel",
    ],
}
BLOBS = "unit/checkpoint/test_blobs.py"
HOSTILE = "unit/checkpoint/test_hostile_objects.py"
MANIFEST = "unit/checkpoint/test_manifest.py"
MATRIX |= {
    "checkpoints: disk full in the middle of a blob": [
        f"{BLOBS}::test_no_space_is_said_and_leaves_nothing_behind",
        f"{KERNEL_TOO}::test_no_space_for_a_blob",
    ],
    "checkpoints: a read-only store": [f"{BLOBS}::test_a_folder_that_cannot_be_written_is_named"],
    "checkpoints: a blob truncated, flipped or replaced": [
        f"{BLOBS}::test_a_damaged_blob_is_refused_by_name_and_replaced",
        f"{BLOBS}::test_a_chunk_of_another_size_is_refused_before_it_is_mapped",
        f"{KERNEL_TOO}::test_a_truncated_blob_is_refused",
        f"{KERNEL_TOO}::test_nothing_is_built_on_a_damaged_array",
        f"{KERNEL}::test_an_altered_blob_and_a_missing_one_are_refused",
    ],
    "checkpoints: a manifest with a wrong signature": [
        f"{MANIFEST}::test_another_key_is_refused_by_name",
        f"{MANIFEST}::test_an_altered_manifest_is_refused_before_it_is_parsed",
        f"{MANIFEST}::test_a_pickle_bomb_in_a_tampered_manifest_does_not_go_off",
    ],
    "checkpoints: a newer format": [f"{MANIFEST}::test_a_newer_format_is_said_to_be_newer"],
    "checkpoints: a reduction that raises, recurses without end or returns rubbish": [
        f"{HOSTILE}::test_what_an_object_does_of_its_own_takes_only_itself_down",
        f"{HOSTILE}::test_a_path_without_end_is_told_in_short",
    ],
    "checkpoints: a reduction that sleeps": [
        f"{HOSTILE}::test_code_that_does_not_end_is_given_up",
        f"{HOSTILE}::test_a_timer_of_the_notebook_is_left_alone",
        f"{KERNEL_TOO}::test_saving_is_ended_by_a_second_interrupt",
    ],
    "checkpoints: comparing, hashing, printing, measuring that raises, lies or sleeps": [
        f"{HOSTILE}::test_comparing_printing_and_measuring_do_not_matter",
    ],
    "checkpoints: a hundred nested closures": [f"{HOSTILE}::test_odd_but_ordinary_code_comes_back"],
    "checkpoints: a variable that a thread changes": [
        f"{HOSTILE}::test_variables_that_a_thread_changes_are_kept_or_refused",
    ],
    "checkpoints: very large objects, by the same path in small": [
        "unit/checkpoint/test_mapped.py::test_untouched_memory_is_known_by_its_chunks_and_not_read",
        f"{BLOBS}::test_chunks_are_mapped_side_by_side",
        f"{BLOBS}::test_mapping_takes_no_memory_until_it_is_touched",
    ],
    "checkpoints: a million variables": [f"{KERNEL_TOO}::test_a_namespace_of_very_many_variables"],
}
MATRIX |= {
    "calls: a retry policy that is nonsense": [
        "unit/test_policies.py::test_a_policy_that_is_nonsense_is_refused",
        "unit/kernel/test_rewrite.py::test_a_policy_that_is_nonsense_is_refused_at_the_line",
        f"{HERE}::test_a_step_cell_that_can_not_run_is_refused_before_the_run",
        f"{HERE}::test_a_run_that_makes_no_sense_is_refused",
    ],
    "calls: a timeout of zero": [
        "unit/kernel/test_rewrite.py::test_a_policy_that_is_nonsense_is_refused_at_the_line",
        f"{HERE}::test_a_run_that_makes_no_sense_is_refused",
    ],
}
linux = pytest.mark.skipif(sys.platform != "linux", reason="sets the limits of another process")


def test_each_item_names_tests_that_exist() -> None:
    """The matrix is complete, and can't rot."""
    tests = Path(__file__).parents[1]
    for named in (name for names in MATRIX.values() for name in names):
        path, _, function = named.partition("::")
        tree = ast.parse((tests / path).read_text(encoding="utf-8"))
        assert function in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)], named


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("%%step one --retires 3\nx = 1", "no option --retires"),
        ("%%step two\nx = 1", "are the step 'two': cell 2 (id cell-1) and cell 3"),
        ("y = 1\n%%step one\nx = 1", "stands on line 2"),
        ("%%step one\n# nothing", "step `one` has no code"),
        ("%%step\nx = 1", "needs a name"),
        ("%%step one --retries -1\nx = 1", "retries can't be -1"),
        ("%%step one --retries 1 --min-wait '5 minutes'\nx = 1", "'5 minutes' is no duration"),
        ("%%step one --timeout 0s\nx = 1", "a timeout of 0"),
    ],
)
def test_a_step_cell_that_can_not_run_is_refused_before_the_run(
    own_project: Project, cell: str, said: str
) -> None:
    """Guarantee 11: hours of work must not end at a typo; status 2, the cell is named, nothing was begun."""
    own_project.notebook("wrong.ipynb", "%%step two\nx = 1", cell)
    found = own_project.run("run", "wrong.ipynb")
    assert (found.returncode, found.stdout) == (2, "")
    assert said in found.stderr
    assert "cell 3 (id cell-2)" in found.stderr
    assert "wrong.ipynb" in found.stderr
    assert not own_project.home.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--retries", "-1"), "retries can't be -1"),
        (("--retries", "1001"), "0 to 1000"),
        (("--timeout", "0s"), "a timeout of 0 would let nothing run"),
        (("--timeout", "nan"), "'nan' is no duration"),
        (("--delay", "5 minutes"), "'5 minutes' is no duration"),
        (("--ttl", "0s"), "a ttl of 0 would let nothing run"),
        (("--on-exhausted", "explode"), "on_exhausted can't be 'explode'"),
    ],
)
def test_a_run_that_makes_no_sense_is_refused(
    own_project: Project, words: tuple[str, ...], said: str
) -> None:
    """Guarantee 11: status 2, and nothing was begun."""
    own_project.notebook("fine.ipynb", "%%step one\nx = 1")
    found = own_project.run("run", "fine.ipynb", *words)
    assert (found.returncode, found.stdout) == (2, "")
    assert said in found.stderr
    assert not own_project.home.exists()


def test_a_syntax_error_is_shown_as_the_users_own(project: Project) -> None:
    """Guarantee 11: status 1, Python's own words with the cell's line, nothing of ours above them."""
    project.notebook("syntax.ipynb", "%%step kept\nx = 1", "%%step one\n\ny = (x\n")
    found = project.run("run", "syntax.ipynb")
    assert found.returncode == 1
    assert "line 3" in found.stdout
    assert "Error: incomplete input" in found.stdout  # from Python 3.13 on of a kind below SyntaxError
    assert "1 of 2 steps are kept (kept)" in found.stdout
    assert "site-packages" not in found.stdout


def test_a_date_is_a_parameter(project: Project) -> None:
    """Guarantee 7: from the command line and from a YAML file, a date arrives as ISO text."""
    project.notebook("date.ipynb", "%%step one\ndurable.result(d=d, e=e)", parameters="d = e = None")
    (project.folder / "p.yaml").write_text("d: 2026-11-22\n")
    found = project.run("run", "date.ipynb", "-f", "p.yaml", "-p", "e", "2026-11-23", "--json")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["result"] == {"d": "2026-11-22", "e": "2026-11-23"}


def test_notebooks_without_code_complete_under_any_name(project: Project) -> None:
    """Nothing to do is no error; a name may have spaces, quotes and letters of any language."""
    path = notebooks.write(project.folder / "a b 'ü' 名.ipynb", [])
    done = project.run("run", path.name)
    assert (done.returncode, done.stderr) == (0, "")
    assert list((project.home / "outputs").glob("a b 'ü' 名-*.ipynb"))


def test_an_idempotency_key_of_another_run_is_told(project: Project) -> None:
    """Guarantee 11: who gets another run than the one that the words describe, hears of it."""
    project.notebook("first.ipynb", "%%step one\nx = n", parameters="n = 1")
    words = ("run", "first.ipynb", "--detach", "--idempotency-key", "k1")
    first = project.run(*words, "--json")
    again = project.run(*words, "--json")
    assert "note: " not in first.stderr + again.stderr
    other = project.run(*words, "-p", "n", "2", "--json")
    run = json.loads(first.stdout)["id"]
    assert json.loads(other.stdout)["id"] == run
    assert f"the key 'k1' belongs to run {run[-8:]} of first.ipynb" in other.stderr
    project.run("logs", "-f", run)


def test_a_timer_is_not_approved_and_an_end_is_an_end(project: Project) -> None:
    """Guarantee 5: a person answers approvals, not timers; cancelled twice is cancelled; ended is not cancelled."""
    project.notebook("nap.ipynb", "%%step nap\ndurable.sleep('1h')")
    run = project.json("run", "nap.ipynb", "--detach")
    [wait] = until(lambda: project.json("waits"), what="the run sleeps")
    refused = project.run("approve", wait["id"])
    assert refused.returncode == 1
    assert f"{wait['id']} is a timer" in refused.stderr
    assert [project.json("cancel", run["id"])["status"] for _ in range(2)] == ["cancelled", "cancelled"]
    project.notebook("done.ipynb", "x = 1")
    done = json.loads(project.run("run", "done.ipynb", "--json").stdout)
    refused = project.run("cancel", done["id"])
    assert refused.returncode == 1
    assert f"run {done['id'][-8:]} is completed" in refused.stderr


@linux
@pytest.mark.parametrize(
    ("whose", "said"),
    [("os.getpid()", "no space left for a blob of"), ("os.getppid()", "can't be written")],
    ids=["blob", "output"],
)
def test_no_space_fails_a_headless_run_which_then_goes_on(project: Project, whose: str, said: str) -> None:
    """Guarantees 1, 3, 11: status 1, what could not be written, and the command that goes on; nothing is repeated."""
    flag = project.folder / f"there-is-space-{len(said)}"
    limit = f"resource.prlimit({whose}, resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))"
    project.notebook(
        "full.ipynb",
        "import os, resource",
        "%%step kept\nx = 1",
        f"if not os.path.exists({str(flag)!r}):\n    {limit}",
        "%%step big\ny = os.urandom(200_000)",
    )
    found = project.run("run", "full.ipynb")
    assert found.returncode == 1, found.stdout
    assert said in found.stdout
    [run] = project.json("ls", "--status", "failed", "--notebook", "full.ipynb", "--limit", "1")
    assert f"nbdurable resume {run['id'][-8:]}" in found.stdout
    flag.touch()
    project.run("resume", run["id"])
    project.run("logs", "-f", run["id"])
    ended = project.json("show", run["id"])
    assert ended["status"] == "completed"
    kept = next(step for step in ended["steps"] if step["name"] == "kept")
    assert (kept["executions"], kept["restores"]) == (1, 1)
    assert Path(ended["output"]).exists()


@linux
def test_a_headless_run_outlasts_a_store_without_space(own_project: Project) -> None:
    """Guarantees 3, 6, 11: who follows is told why nothing happens; with space the run goes on by itself."""
    own_project.home.mkdir(mode=0o700)
    (own_project.home / "settings.toml").write_text("lease_s = 2.0\n")
    flag = own_project.folder / "once"
    place, log = own_project.home / "coordinator.json", own_project.home / "store.journal"
    own_project.notebook(
        "full.ipynb",
        "import json, os, resource",
        "%%step kept\nx = 1",
        f"if not os.path.exists({str(flag)!r}):\n    open({str(flag)!r}, 'w').close()\n"
        f"    pid = json.load(open({str(place)!r}))['pid']\n"
        f"    size = os.path.getsize({str(log)!r})\n"
        "    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))",
        "%%step late\ny = x + 1\ndurable.result(y=y)",
    )
    with own_project.start("run", "full.ipynb", "--json") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        told = ""
        for line in process.stderr:
            told += line
            if "free space on the disk" in line:
                break
        assert "the run goes on by itself once this is over: there is no space left" in told
        pid = json.loads(place.read_text())["pid"]
        psutil.Process(pid).rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))
        rest = process.stderr.read()
        run = json.loads(process.stdout.read())
        assert process.wait() == 0, rest
    assert run["result"] == {"y": 2}
    assert [step["executions"] for step in run["steps"] if step["name"] == "kept"] == [1]
    assert "Traceback" not in (own_project.home / "logs" / "coordinator.log").read_text()


def test_a_damaged_blob_stops_a_resumed_run_and_put_back_it_goes_on(project: Project) -> None:
    """Guarantees 1, 8, 11: the error names blob, step and what to do; nothing is loaded, and nothing repeated."""
    flag = project.folder / "mended"
    project.notebook("blob.ipynb", "import os", "%%step a\nx = os.urandom(200_000)", f"open({str(flag)!r})")
    before = {path for path in (project.home / "blobs").rglob("*") if path.is_file()}
    project.run("run", "blob.ipynb")
    [run] = project.json("ls", "--status", "failed", "--notebook", "blob.ipynb")
    flag.touch()
    [blob] = [
        path
        for path in (project.home / "blobs").rglob("*")
        if path not in before and path.is_file() and path.stat().st_size > 100_000
    ]
    whole = blob.read_bytes()
    for harm, said in (
        (None, "is missing"),
        (bytes(len(whole)), "is not what was written"),
    ):
        blob.unlink(missing_ok=True)
        if harm is not None:
            blob.write_bytes(harm)
        project.run("resume", run["id"])
        project.run("logs", "-f", run["id"])
        shown = project.json("show", run["id"])
        assert shown["status"] == "failed"
        assert f"blob {blob.name} {said}" in shown["error"]["message"]
        assert "step `a` needs it for `x`" in shown["error"]["message"]
        assert "Put the file back" in shown["error"]["message"]
    blob.unlink()
    blob.write_bytes(whole)
    project.run("resume", run["id"])
    project.run("logs", "-f", run["id"])
    ended = project.json("show", run["id"])
    assert (ended["status"], ended["steps"][0]["executions"]) == ("completed", 1)


@pytest.mark.parametrize("words", [["run", "a.ipynb"], ["ls"], ["up"]], ids=["run", "ls", "up"])
def test_a_state_folder_that_can_not_be_used_is_named(own_project: Project, words: list[str]) -> None:
    """Guarantee 11: a file in the folder's place; it stays as it is."""
    own_project.notebook("a.ipynb", "x = 1")
    own_project.home.write_text("mine")
    found = own_project.run(*words)
    assert (found.returncode, found.stdout) == (1, "")
    assert f"can't be kept in {own_project.home}" in found.stderr
    assert "--home DIR" in found.stderr
    assert own_project.home.read_text() == "mine"


def test_a_misspelt_setting_is_named(own_project: Project) -> None:
    """Guarantee 11: status 2, the file, the word, and the words that there are."""
    own_project.home.mkdir(mode=0o700)
    (own_project.home / "settings.toml").write_text('on_drfit = "keep"\n')
    found = own_project.run("ls")
    assert (found.returncode, found.stdout) == (2, "")
    assert "no setting 'on_drfit'" in found.stderr
    assert "settings.toml" in found.stderr
    assert "on_drift" in found.stderr
