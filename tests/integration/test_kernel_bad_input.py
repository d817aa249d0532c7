"""What a person at a kernel sees when disk, blobs, settings or coordinator are in trouble (guarantee 11).

`tests/acceptance/test_bad_input.py` lists which test holds which item of issue 2.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from nbdurable.settings import Home
from tests.tools import notebooks
from tests.tools.kernels import Kernel, Reply
from tests.tools.processes import Coordinator, until

LOAD = "%load_ext nbdurable"
linux = pytest.mark.skipif(sys.platform != "linux", reason="sets the limits of another process")


@pytest.fixture(scope="module")
def home_of_kernel(started_home: Callable[[], Home]) -> Home:
    """Return the home of the kernel that the tests of this file share."""
    return started_home()


@pytest.fixture(scope="module")
def lasting(home_of_kernel: Home, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """Start a kernel of the notebook `n.ipynb`."""
    folder = tmp_path_factory.mktemp("lasting")
    found = Kernel(home_of_kernel.root, notebooks.write(folder / "n.ipynb", []), folder)
    found.run(LOAD)
    yield found
    found.shutdown()


@pytest.fixture
def kernel(lasting: Kernel) -> Kernel:
    """Return the lasting kernel, at the beginning of a new run."""
    lasting.run("%reset -f")
    lasting.run("%durable new")
    return lasting


def refused(reply: Reply, kind: str) -> str:
    """Check that a cell ended with one clear error of ours and no traceback; return what it says."""
    assert reply.status == "error"
    assert reply.content["ename"] == kind
    assert "Traceback" not in reply.error
    assert "nbdurable/" not in reply.error.replace(".nbdurable/", "")
    return reply.error


@linux
def test_no_space_for_a_blob(kernel: Kernel, home_of_kernel: Home) -> None:
    """Guarantees 2, 3: the variables stay in the kernel, nothing is committed, and with space the cell commits."""
    limits = psutil.Process(kernel.pid)
    cell = "%%step big\nimport os\ny = os.urandom(200_000)"
    assert "✓ small" in kernel.run("%%step small\nx = 1", "s").notes
    before = set(home_of_kernel.blobs.rglob("*"))
    limits.rlimit(psutil.RLIMIT_FSIZE, (1000, psutil.RLIM_INFINITY))
    try:
        said = refused(kernel.run(cell, "b"), "StoreFull")
    finally:
        limits.rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))
    assert "no space left for a blob of" in said
    assert "nothing was committed. Free some space" in said
    assert kernel.value("len(y)") == "200000"
    assert not [path for path in set(home_of_kernel.blobs.rglob("*")) - before if path.is_file()]
    assert "✓ big" in kernel.run(cell, "b").notes
    assert "↺ small" in kernel.run("%%step small\nx = 1", "s").notes


@linux
def test_no_space_for_the_store(kernel: Kernel, home_of_kernel: Home) -> None:
    """Guarantees 2, 3: what was acknowledged is kept, what was not can be repeated as soon as there is space."""
    coordinator = psutil.Process(Coordinator(home_of_kernel).pid)
    assert "✓ small" in kernel.run("%%step small\nx = 1", "s").notes
    log = home_of_kernel.root / "store.journal"
    coordinator.rlimit(psutil.RLIMIT_FSIZE, (log.stat().st_size, psutil.RLIM_INFINITY))
    try:
        said = refused(kernel.run("%%step late\ny = x + 1", "l"), "StoreFull")
    finally:
        coordinator.rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))
    assert "no space left to commit" in said
    assert str(home_of_kernel.root) in said
    assert "what was acknowledged is kept" in said
    assert "✓ late" in kernel.run("%%step late\ny = x + 1", "l").notes
    assert kernel.value("y") == "2"
    assert "↺ small" in kernel.run("%%step small\nx = 1", "s").notes


def test_a_truncated_blob_is_refused(kernel: Kernel, home_of_kernel: Home) -> None:
    """Guarantee 8: a blob that lost its end is named with both sizes; nothing is loaded, nothing crashes."""
    cell = "%%step cut\nbig = bytes(range(256)) * 401"
    before = set(home_of_kernel.blobs.rglob("*"))
    assert "✓ cut" in kernel.run(cell, "c").notes
    [blob] = [path for path in set(home_of_kernel.blobs.rglob("*")) - before if path.is_file()]
    whole = blob.read_bytes()
    blob.unlink()
    blob.write_bytes(whole[:5000])
    kernel.restart()
    kernel.run(LOAD)
    said = refused(kernel.run(cell, "c"), "BlobDamaged")
    assert f"blob {blob.name} has 5000 bytes instead of {len(whole)}" in said
    assert "step `cut` needs it for `big`" in said
    assert "%durable rerun cut" in said
    assert kernel.value("'big' in globals()") == "False"
    blob.unlink()
    blob.write_bytes(whole)
    assert "↺ cut" in kernel.run(cell, "c").notes
    assert kernel.value("len(big)") == str(256 * 401)


def test_nothing_is_built_on_a_damaged_array(kernel: Kernel, home_of_kernel: Home) -> None:
    """Guarantee 7: a large array is mapped before it is verified; what was made of damaged bytes is not committed."""
    cell = "%%step whole\nimport numpy as np\nbig = np.arange(400_000)"
    before = set(home_of_kernel.blobs.rglob("*"))
    assert "✓ whole" in kernel.run(cell, "c").notes
    [blob] = [path for path in set(home_of_kernel.blobs.rglob("*")) - before if path.is_file()]
    content = bytearray(blob.read_bytes())
    content[0] ^= 1
    blob.unlink()
    blob.write_bytes(content)
    kernel.restart()
    kernel.run(LOAD)
    assert "↺ whole" in kernel.run(cell, "c").notes
    said = refused(kernel.run("%%step total\ntotal = int(big.sum())", "t"), "BlobDamaged")
    assert blob.name in said
    assert "step `whole` needs it for `big`" in said
    assert "%durable rerun" in said
    refused(kernel.run("print(total)"), "BlobDamaged")  # plain cells say it too, once it is known

    kernel.run("%durable rerun whole")
    assert "✓ whole" in kernel.run(cell, "c").notes
    assert "✓ total" in kernel.run("%%step total\ntotal = int(big.sum())", "t").notes
    kernel.restart()
    kernel.run(LOAD)
    kernel.run(cell, "c")
    assert kernel.value("int(big.sum())") == str(sum(range(400_000)))


def test_a_namespace_of_very_many_variables(kernel: Kernel) -> None:
    """A step that leaves more than a checkpoint holds is told so; others go on beside what it left."""
    cell = "%%step many\nfor number in range(60_000): globals()[f'v{number}'] = number"
    assert "✓ small" in kernel.run("%%step small\nx = 1", "s").notes
    said = refused(kernel.run(cell, "m"), "StepUsageError")
    assert "wrote 60,001 variables" in said
    assert "one dict or list" in said
    assert "✓ next" in kernel.run("%%step next\ny = v7", "n").notes
    assert "↺ small" in kernel.run("%%step small\nx = 1", "s").notes


def test_saving_is_ended_by_a_second_interrupt(kernel: Kernel, tmp_path: Path) -> None:
    """An object whose reduction does not end holds nobody up; what was kept before is there, the kernel is alive."""
    flag = tmp_path / "saving"
    assert "✓ small" in kernel.run("%%step small\nx = 1", "s").notes
    cell = (
        "%%step slow\nimport pathlib, time\nclass A:\n    def __reduce__(self):\n"
        f"        while True: time.sleep(0.02); pathlib.Path({str(flag)!r}).touch()\nv = A()"
    )
    sent = kernel.send(cell, "w")
    until(flag.exists, what="the object is looked at")
    kernel.interrupt()
    flag.unlink()
    until(flag.exists, what="the first interrupt is held back")
    kernel.interrupt()
    reply = kernel.collect(sent)
    assert reply.content["ename"] == "KeyboardInterrupt"
    assert "nothing was kept" in reply.error
    assert "did not finish" in reply.notes
    assert kernel.value("x") == "1"
    kernel.run("del v")
    assert "↺ small" in kernel.run("%%step small\nx = 1", "s").notes


def test_a_coordinator_that_refuses_is_told_in_the_kernel(kernel: Kernel, home_of_kernel: Home) -> None:
    """A replaced token: what is wrong and the command that mends it; put back, the run goes on."""
    assert "✓ a" in kernel.run("%%step a\nx = 1", "a").notes
    token = home_of_kernel.token.read_text()
    home_of_kernel.token.write_text("0" * 64)
    try:
        kernel.restart()
        assert "nbdurable down" in refused(kernel.run(LOAD), "Unauthorized")
    finally:
        home_of_kernel.token.write_text(token)
    kernel.run(LOAD)
    assert "↺ a" in kernel.run("%%step a\nx = 1", "a").notes


def test_settings_that_can_not_be_used_are_told_in_the_kernel(home: Home, tmp_path: Path) -> None:
    """The file, the word, the words there are; mended, the same kernel works."""
    settings = home.root / "settings.toml"
    settings.write_text("lease = 3\n")
    kernel = Kernel(home.root, notebooks.write(tmp_path / "n.ipynb", []), tmp_path)
    try:
        said = refused(kernel.run(LOAD), "UsageError")
        assert "no setting 'lease'" in said
        assert str(settings) in said
        settings.unlink()
        kernel.run(LOAD)
        assert "✓ a" in kernel.run("%%step a\nx = 1", "a").notes
    finally:
        kernel.shutdown()
