"""The register of trusted stores, and which stores need no question."""

from __future__ import annotations

import shutil
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nbdurable import security, trust
from nbdurable.errors import StoreDamaged, StoreError, Untrusted
from nbdurable.settings import Home


@pytest.fixture(autouse=True)
def register(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test is a user of its own."""
    monkeypatch.setenv("NBDURABLE_CONFIG", str(tmp_path / "config"))
    monkeypatch.delenv("NBDURABLE_TRUST", raising=False)
    return tmp_path / "config" / "trusted"


@pytest.fixture
def own(tmp_path: Path) -> Home:
    return Home(tmp_path / "project" / ".nbdurable").create()


def become_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBDURABLE_CONFIG", str(tmp_path / "other"))


def test_a_store_that_begins_here_is_trusted_wherever_it_moves(
    own: Home, tmp_path: Path, register: Path
) -> None:
    """Nobody is asked about a store of one's own; folders are moved, copied and mounted."""
    key = security.load_key(own)
    own.store.touch()
    assert security.load_key(own) == key
    moved = Home(tmp_path / "elsewhere")
    own.root.rename(moved.root)
    assert security.load_key(moved) == key
    (entry,) = trust.entries()
    assert (entry.fingerprint, entry.path) == (security.fingerprint(key), str(own.root))
    assert stat.S_IMODE(register.stat().st_mode) == 0o700
    assert stat.S_IMODE((register / entry.fingerprint).stat().st_mode) == 0o600
    assert key.hex() not in (register / entry.fingerprint).read_text()


def test_a_store_of_somebody_else_is_refused_until_it_is_accepted(
    own: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guarantee 8: a store that verifies itself is no proof of who made it."""
    key = security.load_key(own)
    own.store.touch()
    become_another_user(tmp_path, monkeypatch)
    with pytest.raises(Untrusted) as refused:
        security.load_key(own)
    assert security.fingerprint(key) in refused.value.message
    assert f"nbdurable trust {own.root}" in refused.value.todo
    assert security.read_key(own) == key, "its manifests can be looked at"
    assert security.accept(own) == security.fingerprint(key)
    assert security.load_key(own) == key
    assert trust.remove(security.fingerprint(key))
    assert not trust.remove(security.fingerprint(key))
    assert isinstance(security.standing(own), Untrusted)


@pytest.mark.parametrize("part", ["store.duckdb", "store.journal", "backups"])
def test_what_lies_in_a_store_without_a_key_is_not_ours(own: Home, part: str) -> None:
    """A queued run needs no signature: who sends a store without a key must not get one from us."""
    (own.root / part).touch()
    with pytest.raises(Untrusted):
        security.load_key(own)
    assert not own.key.exists()
    assert not trust.entries()
    security.accept(own)
    assert security.load_key(own)


def test_a_folder_of_another_user_is_not_begun_silently(own: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a shared machine `/tmp/.nbdurable` may be anybody's, who could put there what he likes."""
    monkeypatch.setattr("os.getuid", lambda: own.root.stat().st_uid + 1)
    with pytest.raises(Untrusted):
        security.load_key(own)
    assert not own.key.exists()


def test_looking_creates_nothing(tmp_path: Path, register: Path) -> None:
    """`doctor` and `ls` ask; they do not begin a store."""
    home = Home(tmp_path / "nothing" / ".nbdurable")
    assert security.standing(home) is None
    assert not home.root.exists()
    assert not register.exists()


def test_the_environment_trusts_by_fingerprint(
    own: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container with a new HOME and the project's own state is told whom to trust."""
    key = security.load_key(own)
    become_another_user(tmp_path, monkeypatch)
    monkeypatch.setenv("NBDURABLE_TRUST", f"{'0' * 32}, {security.fingerprint(key)}")
    assert security.load_key(own) == key
    for wrong in ("1", "", "*", security.fingerprint(key)[:16]):
        monkeypatch.setenv("NBDURABLE_TRUST", wrong)
        with pytest.raises(Untrusted):
            security.load_key(own)


def test_a_register_that_others_can_write_is_not_believed(own: Home, register: Path) -> None:
    """Guarantee 11: it says what is wrong and what to do; it neither trusts all nor forgets all."""
    security.load_key(own)
    register.chmod(0o777)
    with pytest.raises(StoreError, match="can be written by other users") as refused:
        security.load_key(own)
    assert f"chmod 700 {register}" in refused.value.todo
    register.chmod(0o700)
    assert security.load_key(own)


def test_a_damaged_note_harms_nothing(own: Home, register: Path) -> None:
    """What is trusted stands in the entry's name; its note is for people."""
    name = security.fingerprint(security.load_key(own))
    (register / name).write_bytes(b"\x00\xff{")
    (register / "README").write_text("not an entry")
    assert security.load_key(own)
    assert trust.entries() == [trust.Entry(name)]


def test_where_the_configuration_cannot_be_written_a_folder_that_can_is_used(
    own: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container's HOME may be read-only: its runs are not lost for it."""
    monkeypatch.delenv("NBDURABLE_CONFIG")
    (tmp_path / "home").write_text("a file: nothing can be made below it")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    key = security.load_key(own)
    assert security.load_key(own) == key
    assert (trust.folders()[1] / security.fingerprint(key)).is_file()


def test_where_nothing_can_be_noted_nothing_begins(
    own: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Better refused before the first step than after the crash, when the run would not be trusted."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("NBDURABLE_CONFIG", str(tmp_path / "file"))
    with pytest.raises(StoreError, match="can't be noted") as refused:
        security.load_key(own)
    assert "NBDURABLE_CONFIG" in refused.value.todo
    assert not own.key.exists()


def test_a_damaged_key_is_named(own: Home) -> None:
    """Guarantee 11: a key that is cut short is an accident, not a stranger."""
    own.key.write_text("abc")
    with pytest.raises(StoreDamaged, match="is damaged"):
        security.load_key(own)


def test_many_begin_a_store_at_once(tmp_path: Path) -> None:
    """Kernel, command and coordinator start together: all get one key, and none finds it untrusted."""
    for attempt in range(20):
        home = Home(tmp_path / str(attempt) / ".nbdurable").create()
        together = threading.Barrier(4)

        def begin(home: Home = home, together: threading.Barrier = together) -> bytes:
            together.wait()
            key = security.load_key(home)
            home.store.touch()
            return key

        with ThreadPoolExecutor(4) as pool:
            assert len({one.result() for one in [pool.submit(begin) for _ in range(4)]}) == 1
        assert security.fingerprint(security.read_key(home)) in {one.fingerprint for one in trust.entries()}
        shutil.rmtree(home.root)
