"""What `--watch` names, and what of it counts (guarantees 1, 9 and 11)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nbdurable.checkpoint.watched import Watcher, missing
from nbdurable.errors import UsageError

KEY = b"k" * 32


def test_the_content_of_a_file_counts_and_nothing_else(tmp_path: Path) -> None:
    """Guarantee 1: a touched or copied file is the same one; another content, even of the same size, is not."""
    data = tmp_path / "data.csv"
    data.write_text("a,b")
    watcher = Watcher(tmp_path, KEY)
    first = watcher.look(["data.csv"])
    os.utime(data, (1, 1))
    assert watcher.look(["data.csv"]) == first
    data.unlink()
    data.write_text("a,b")
    assert watcher.look(["data.csv"]) == first == Watcher(tmp_path, b"x" * 32).look(["data.csv"])
    data.write_text("a;b")
    os.utime(data, (1, 1))
    assert watcher.look(["data.csv"]) != first


def test_a_file_whose_status_is_the_same_is_not_read_again(tmp_path: Path) -> None:
    """A step that watches 10 GB is decided upon at once when it is executed again."""
    data = tmp_path / "data.csv"
    data.write_text("a,b")
    watcher = Watcher(tmp_path, KEY)
    found = watcher.look(["data.csv"])
    status = data.stat()
    watcher._known[data] = (
        (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns),
        "remembered",
    )
    assert watcher.look(["data.csv"]) == {"data.csv": {"data.csv": "remembered"}}
    data.write_text("a,c")
    assert watcher.look(["data.csv"]) not in (found, {"data.csv": {"data.csv": "remembered"}})


def test_a_glob_names_the_files_that_match_now(tmp_path: Path) -> None:
    (tmp_path / "parts" / "folder.txt").mkdir(parents=True)
    watcher = Watcher(tmp_path, KEY)
    assert watcher.look(["parts/*.txt"]) == {"parts/*.txt": {}}
    for name in ("b", "a"):
        (tmp_path / "parts" / f"{name}.txt").write_text(name)
    assert list(watcher.look(["parts/*.txt"])["parts/*.txt"]) == ["parts/a.txt", "parts/b.txt"]
    assert list(watcher.look(["**/a.txt"])["**/a.txt"]) == ["parts/a.txt"]
    absolute = f"{tmp_path}/parts/a*"
    assert list(watcher.look([absolute])[absolute]) == [f"{tmp_path}/parts/a.txt"]
    (tmp_path / "[x].txt").write_text("1")
    assert list(watcher.look(["[x].txt"])["[x].txt"]) == ["[x].txt"]


def test_the_value_of_a_variable_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guarantee 8's spirit: whoever reads a manifest without the key can't test guesses of a secret against it."""
    monkeypatch.setenv("API_MODE", "secret")
    [found] = Watcher(tmp_path, KEY).look(["env:API_MODE"]).values()
    assert "secret" not in str(found)
    assert Watcher(tmp_path, b"x" * 32).look(["env:API_MODE"])["env:API_MODE"] != found
    monkeypatch.setenv("API_MODE", "other")
    assert Watcher(tmp_path, KEY).look(["env:API_MODE"])["env:API_MODE"] != found
    monkeypatch.delenv("API_MODE")
    assert Watcher(tmp_path, KEY).look(["env:API_MODE"]) == {"env:API_MODE": {}}


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    watched = Watcher(tmp_path, KEY).look(
        ["data.csv", "*.parquet", "env:NO_SUCH_VARIABLE_HERE", "data.csv/x"]
    )
    assert missing(watched) == [
        "watched file data.csv does not exist",
        "no file matches the watched *.parquet",
        "watched environment variable NO_SUCH_VARIABLE_HERE is not set",
        "watched file data.csv/x does not exist",
    ]


def test_what_can_not_be_watched_is_refused(tmp_path: Path) -> None:
    """Guarantee 11: what happened, to which object, and what to do."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name, message in (("folder", "is a folder"), ("pipe", "is not a file"), ("loop", "can't be read")):
        with pytest.raises(UsageError, match=message) as caught:
            Watcher(tmp_path, KEY).look([name])
        assert caught.value.todo
