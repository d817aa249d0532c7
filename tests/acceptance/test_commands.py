"""The commands as scripts and people meet them: shapes, exit statuses, messages. Processes only."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import unicodedata
import urllib.request
from pathlib import Path

import pytest

from tests.tools.commands import DEADLINE_S, Project

posix = pytest.mark.skipif(os.name != "posix", reason="signals and modes of POSIX")

ONE = "%%step one\nx = [n] * 10\nprint('one ran')"
TWO = "%%step two\ny = sum(x)\ndurable.result(y=y)"


def test_a_run_completes(project: Project) -> None:
    """Guarantees 1, 9: status 0, the documented shape, each step ran once, for a reason."""
    project.notebook("plain.ipynb", ONE, TWO, parameters="n = 1")
    out = project.folder / "done.ipynb"
    found = project.run("run", "plain.ipynb", "-p", "n", "4", "-o", str(out), "--tag", "t1", "--json")
    assert found.returncode == 0, found.stderr
    run = json.loads(found.stdout)
    assert run["status"] == "completed"
    assert run["parameters"] == {"n": 4}
    assert run["result"] == {"y": 40}
    assert run["output"] == str(out)
    assert run["recoveries"] == 0
    assert [(s["name"], s["status"], s["executions"], s["restores"]) for s in run["steps"]] == [
        ("one", "completed", 1, 0),
        ("two", "completed", 1, 0),
    ]
    assert all(step["reason"] for step in run["steps"])
    [variable] = run["steps"][0]["variables"]
    assert variable["name"] == "x"
    assert {"name", "type", "bytes", "state"} <= set(variable)
    assert out.exists()
    assert project.json("show", run["id"])["steps"] == run["steps"]
    assert project.json("show", run["id"][-8:])["id"] == run["id"]
    assert run["id"] in [
        listed["id"] for listed in project.json("ls", "--status", "completed", "--tag", "t1")
    ]
    assert "y" in project.run("show", run["id"]).stdout


def test_a_plan_says_what_would_happen_and_why(project: Project) -> None:
    """Guarantee 9: before anything happens, for a notebook as it is now, and for a run as it would be resumed."""
    project.notebook("planned.ipynb", ONE, TWO, parameters="n = 1")
    before = project.json("plan", "planned.ipynb")
    assert [(step["name"], step["action"]) for step in before] == [("one", "run"), ("two", "run")]
    run = json.loads(project.run("run", "planned.ipynb", "-p", "n", "2", "--json").stdout)
    project.notebook("planned.ipynb", ONE, TWO.replace("sum", "max"), parameters="n = 1")
    after = project.json("plan", "planned.ipynb")
    assert [(step["name"], step["action"]) for step in after] == [("one", "restore"), ("two", "run")]
    assert all(step["reason"] for step in after)
    assert {step["action"] for step in project.json("plan", run["id"])} == {"restore"}
    assert "restore" in project.run("plan", run["id"]).stdout


def test_a_plan_names_what_changed_and_where(project: Project) -> None:
    """Guarantee 9: the helper, its cell and line; in parts for scripts; what stands on the step comes with it."""
    helper = "LIMIT = 3\n\ndef clean(x):\n    # drop\n    y = x\n    return y"
    cells = ("%%step one\nx = clean(LIMIT)", "%%step two\ny = x + 1", "%%step three\nz = 1")
    project.notebook("why.ipynb", helper, *cells)
    run = json.loads(project.run("run", "why.ipynb", "--json").stdout)
    assert run["status"] == "completed"
    project.notebook("why.ipynb", f"# helpers\n{helper}".replace("return y", "return -y"), *cells)
    one, two, three = project.json("plan", "why.ipynb")
    assert (one["action"], one["reason"]) == ("run", "helper `clean` changed (cell 2, line 7)")
    assert one["cause"] == {"kind": "helper", "name": "clean", "cell": "cell 2", "line": 7}
    assert (two["action"], two["reason"]) == ("run", "its input `x` comes from one")
    assert (three["action"], three["cause"]) == ("restore", None)
    assert (
        "one    run       helper `clean` changed (cell 2, line 7)" in project.run("plan", "why.ipynb").stdout
    )
    project.notebook("why.ipynb", helper.replace("LIMIT = 3", "LIMIT = 4"), *cells)
    one, *_ = project.json("plan", "why.ipynb")
    assert one["reason"] == "its input `LIMIT` changed (cell 2, line 1)"
    assert one["cause"] == {"kind": "input", "name": "LIMIT", "cell": "cell 2", "line": 1}


@posix
def test_a_followed_run_tells_each_step_also_across_the_coordinators_death(project: Project) -> None:
    """Guarantees 3, 5, 9: a run that only sleeps is followed on; plain lines, no control character."""
    project.notebook("told.ipynb", ONE, "%%step nap\ndurable.sleep('2s')", parameters="n = 1")
    with project.start("run", "told.ipynb") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        text = ""
        for line in process.stdout:
            text += line
            if "sleeps until" in line:
                os.kill(json.loads((project.home / "coordinator.json").read_text())["pid"], signal.SIGKILL)
        assert process.wait(DEADLINE_S) == 0
        assert process.stderr.read() == ""
    lines = [line.split() for line in text.splitlines()]
    assert lines[0][:2] == ["told.ipynb", "run"]
    assert ["✓", "one"] in [line[:2] for line in lines]
    assert ["⏸", "nap", "sleeps", "until"] in [line[:4] for line in lines]
    assert ["✓", "nap"] in [line[:2] for line in lines]
    assert "completed" in lines[-1]
    assert not [c for c in text if unicodedata.category(c) == "Cc" and c != "\n"]


def test_an_approval_ends_the_command_and_an_answer_goes_on(project: Project) -> None:
    """Guarantees 1, 5: status 3 with the command that answers; answered once; nothing before it repeated."""
    project.notebook(
        "ask.ipynb",
        ONE,
        "%%step gate\nd = durable.approve({'n': n}, title='Publish?')",
        "%%step end\ndurable.result(n=d.value['n'])",
        parameters="n = 1",
    )
    found = project.run("run", "ask.ipynb")
    assert found.returncode == 3, found.stderr
    wait = next(w for w in project.json("waits") if w["title"] == "Publish?")
    assert f"nbdurable approve {wait['id']}" in found.stdout
    assert "is waiting (exit status 3)" in found.stdout
    assert wait["id"] in project.run("waits").stdout
    shown = project.json("show", wait["run_id"])
    assert (shown["status"], shown["driver"]) == ("waiting", None)
    assert [(w["id"], w["kind"], w["status"]) for w in shown["waits"]] == [(wait["id"], "approval", "open")]

    broken = project.run("approve", wait["id"], "--value", "{n: 5}")
    assert (broken.returncode, broken.stdout) == (2, "")
    assert "--value is not JSON" in broken.stderr

    answered = project.json("approve", wait["id"].lower(), "--value", '{"n": 5}', "--comment", "five")
    assert (answered["status"], answered["answer"]["edited"], answered["answer"]["comment"]) == (
        "answered",
        True,
        "five",
    )
    twice = project.run("reject", wait["id"])
    assert twice.returncode == 1
    assert f"{wait['id']} (Publish?) was approved" in twice.stderr

    assert project.run("logs", "-f", wait["run_id"]).returncode == 0
    ended = project.json("show", wait["run_id"])
    assert (ended["status"], ended["result"]) == ("completed", {"n": 5})
    assert [step["executions"] for step in ended["steps"] if step["name"] == "one"] == [1]


def test_a_failed_run_shows_the_users_error_and_can_be_resumed(project: Project) -> None:
    """Guarantees 1, 11: the user's traceback, what is kept; resumed, the kept step does not run again."""
    flag = project.folder / "flag"
    project.notebook(
        "fail.ipynb", ONE, f"%%step two\nassert open({str(flag)!r}).read() == 'ok'", parameters="n = 1"
    )
    found = project.run("run", "fail.ipynb")
    assert found.returncode == 1
    assert found.stdout.index("FileNotFoundError") < found.stdout.index("1 of 2 steps are kept (one)")
    [run] = [
        run for run in project.json("ls", "--status", "failed") if run["notebook"].endswith("fail.ipynb")
    ]
    assert f"nbdurable resume {run['id'][-8:]}" in found.stdout
    flag.write_text("ok")
    assert project.json("resume", run["id"])["status"] == "queued"
    project.run("logs", "-f", run["id"])
    ended = project.json("show", run["id"])
    assert ended["status"] == "completed"
    assert [(s["name"], s["executions"], s["restores"]) for s in ended["steps"]] == [
        ("one", 1, 1),
        ("two", 2, 0),
    ]
    again = project.run("resume", run["id"])
    assert again.returncode == 1
    assert "can't resume" in again.stderr


@posix
def test_ctrl_c_leaves_the_run_going_and_cancel_stops_it(project: Project) -> None:
    """Guarantee 6: who follows is not who drives. Cancelled, its committed step is kept."""
    project.notebook("long.ipynb", ONE, "%%step two\nimport time\ntime.sleep(600)", parameters="n = 1")
    with project.start("run", "long.ipynb") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if "one" in line:
                break
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(DEADLINE_S) == 130
        assert "Traceback" not in process.stderr.read()
    [run] = project.json("ls", "--notebook", "long.ipynb")
    assert run["status"] == "running"
    assert f"nbdurable logs -f {run['id'][-8:]}" in rest
    assert f"nbdurable cancel {run['id'][-8:]}" in rest
    assert project.run("cancel", run["id"]).returncode == 0
    project.run("logs", "-f", run["id"])
    ended = project.json("show", run["id"])
    assert ended["status"] == "cancelled"
    assert (ended["steps"][0]["name"], ended["steps"][0]["status"]) == ("one", "completed")


def test_a_detached_run_prints_one_object_and_a_key_returns_the_first_run(project: Project) -> None:
    """Design §6: `id` and `status`; a second run with the key is the first one."""
    project.notebook("key.ipynb", ONE, parameters="n = 1")
    first = project.json("run", "key.ipynb", "--detach", "--idempotency-key", "morning")
    second = project.json("run", "key.ipynb", "--detach", "--idempotency-key", "morning")
    assert {"id", "status"} <= set(first)
    assert second["id"] == first["id"]
    project.run("logs", "-f", first["id"])


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["run", "nowhere.ipynb"], 2, "nowhere.ipynb"),
        (["run", "text.ipynb"], 2, "not JSON"),
        (["run", "old.ipynb"], 2, "nbformat 3"),
        (["run", "good.ipynb", "--kernel", "fortran"], 2, "fortran"),
        (["run", "good.ipynb", "-p", "m", "1"], 2, "'m'"),
        (["run", "good.ipynb", "-o", "no/such/folder/out.ipynb"], 2, "no/such/folder"),
        (["run", "good.ipynb", "-o", "good.ipynb"], 2, "overwrite"),
        (["show", "ffffffff"], 2, "ffffffff"),
        (["logs", "ffffffff"], 2, "ffffffff"),
        (["resume", "ffffffff"], 2, "ffffffff"),
        (["cancel", "ffffffff"], 2, "ffffffff"),
        (["plan", "ffffffff"], 2, "ffffffff"),
        (["show", "ff"], 2, "too short"),
        (["approve", "ZZZZZZ"], 2, "ZZZZZZ"),
        (["reject", "ZZZZZZ"], 2, "ZZZZZZ"),
        (["sql", "drop table runs"], 2, "SELECT"),
        (["sql", "select * from nothing"], 2, "nothing"),
        (["sql", "select * from read_csv('/etc/passwd')"], 2, ""),
    ],
)
def test_bad_input_is_one_clear_message(project: Project, words: list[str], status: int, said: str) -> None:
    """Guarantee 11: what, which, what to do; the exit status; nothing on stdout."""
    project.notebook("good.ipynb", ONE, parameters="n = 1")
    (project.folder / "text.ipynb").write_text("just text")
    (project.folder / "old.ipynb").write_text(
        '{"nbformat": 3, "nbformat_minor": 0, "metadata": {}, "worksheets": []}'
    )
    found = project.run(*words)
    assert (found.returncode, found.stdout) == (status, "")
    assert said in found.stderr
    assert found.stderr.startswith("Error: ")
    assert "Traceback" not in found.stderr


def test_sql_prints_a_table_or_objects(project: Project) -> None:
    """Design §6: `--json` is a list of objects."""
    assert project.json("sql", "select 1 as a, 'x' as b") == [{"a": 1, "b": "x"}]
    lines = project.run("sql", "select 1 as a, 'x' as b").stdout.splitlines()
    assert [line.split() for line in lines] == [["a", "b"], ["1", "x"]]


def test_a_coordinator_of_another_version_is_named(own_project: Project) -> None:
    """Guarantee 11: status 5, both versions, what to do; nothing is lost by it."""
    code = (
        "import nbdurable; nbdurable.__version__ = '99.0'\n"
        "import sys; from nbdurable.coordinator.__main__ import main; sys.exit(main())"
    )
    words = [sys.executable, "-c", code, "--home", str(own_project.home)]
    with subprocess.Popen(words, env=own_project.environment, stderr=subprocess.PIPE, text=True) as other:
        assert other.stderr is not None
        for line in other.stderr:
            if "serves" in line:
                break
        found = own_project.run("ls")
        assert own_project.json("down")["stopped"]
        other.stderr.read()
    assert found.returncode == 5
    assert "99.0" in found.stderr
    assert "nbdurable down" in found.stderr


def test_a_token_that_does_not_match_is_named(own_project: Project) -> None:
    """Guarantee 11: status 5 and what to do."""
    own_project.home.mkdir(mode=0o700)
    own_project.run("ls")
    token = own_project.home / "token"
    token.write_text("0" * 64)
    found = own_project.run("ls")
    assert found.returncode == 5
    assert "token" in found.stderr
    assert own_project.json("down")["stopped"]
    assert own_project.json("ls") == []


@posix
@pytest.mark.parametrize("asked", ["Ctrl-C", "down"])
def test_up_serves_the_pages_until_it_is_asked_to_end(own_project: Project, asked: str) -> None:
    """One address that works, no second `up`, a coordinator that comes back, and nothing left behind."""
    with own_project.start("up", "--port", "0", "--json") as process:
        assert process.stdout is not None
        text = ""
        for line in process.stdout:
            text += line
            if line == "}\n":
                break
        up = json.loads(text)
        browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        with browser.open(up["url"]) as page:
            assert page.status == 200
        place = json.loads((own_project.home / "coordinator.json").read_text())
        assert {"pid", "url", "version"} <= set(place)
        assert place["pid"] == up["pid"]
        second = own_project.run("up")
        assert second.returncode == 1
        assert "up already" in second.stderr
        os.kill(up["pid"], signal.SIGKILL)
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("✓ coordinator") and str(up["pid"]) not in line:
                break
        if asked == "Ctrl-C":
            process.send_signal(signal.SIGINT)
        else:
            assert own_project.json("down")["stopped"]
        assert process.wait(DEADLINE_S) == 0
    assert not (own_project.home / "coordinator.json").exists()
    assert not (own_project.home / "dashboard.json").exists()


def test_down_where_nothing_runs_says_so(own_project: Project) -> None:
    """Ending what isn't there is no error."""
    assert own_project.json("down") == {"stopped": False, "open_runs": None}


@posix
def test_doctor_names_what_is_wrong_and_what_to_do(own_project: Project) -> None:
    """Guarantee 11: one line for each check, status 1 where one fails, and the command that mends it."""
    assert own_project.run("doctor").returncode == 0
    own_project.home.mkdir(mode=0o755)
    own_project.home.chmod(0o755)
    found = own_project.run("doctor")
    assert found.returncode == 1
    assert f"chmod 700 {own_project.home}" in found.stdout
    checks = json.loads(own_project.run("doctor", "--json").stdout)
    assert [check["name"] for check in checks if not check["ok"]] == ["home"]


def test_the_demo_kills_recovers_and_publishes(own_project: Project) -> None:
    """Guarantees 1, 2, 4, 5, 6 in one story, each claim of which the demo checks itself."""
    found = own_project.run("demo", "--yes", "--keep", ".", "--json", deadline_s=150)
    assert found.returncode == 0, found.stdout + found.stderr
    told = json.loads(found.stdout)
    assert told["ok"]
    assert all(finding["holds"] for finding in told["findings"])
    assert told["run"]["recoveries"] == 2
    assert Path(told["report"]).read_text(encoding="utf-8").startswith("# ")
    cells = json.loads(Path(told["output"]).read_text(encoding="utf-8"))["cells"]
    assert not [
        output for cell in cells for output in cell.get("outputs", ()) if output["output_type"] == "error"
    ]
    assert not (own_project.home / "coordinator.json").exists()


def test_down_ends_no_process_that_a_file_only_claims_to_be_the_pages(project: Project) -> None:
    """Guarantee 11: a `dashboard.json` that was copied, or is stale, ends nobody else's process."""
    project.home.mkdir(mode=0o700, exist_ok=True)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        claim = {"pid": other.pid, "url": "http://127.0.0.1:9"}
        (project.home / "dashboard.json").write_text(json.dumps(claim))
        assert project.run("down").returncode == 0
        assert other.poll() is None
        other.kill()


def test_history_shows_what_a_run_said(project: Project) -> None:
    """Guarantee 10: each saying is a line of history, and `logs --events` prints it."""
    says = (
        "%%step count\nrun = durable.current_run()\nrun.metadata.increment('pages', 3)\n"
        "run.log('counted', level='warning', pages=3)"
    )
    project.notebook("says.ipynb", says)
    run = project.json("run", "says.ipynb")
    assert run["metadata"] == {"pages": 3}
    lines = project.run("logs", run["id"], "--events", "--json").stdout.splitlines()
    said = [event for event in map(json.loads, lines) if event["kind"] == "logged"]
    assert [(e["sentence"], e["step"], e["data"]["level"], e["data"]["fields"]) for e in said] == [
        ("counted", "count", "warning", {"pages": 3})
    ]
    told = project.run("logs", run["id"], "--events").stdout
    assert "warning count: counted  pages=3" in told
    assert "metadata: increment pages" in told
    refused = project.run("logs", run["id"], "--json")
    assert (refused.returncode, refused.stdout) == (2, "")
