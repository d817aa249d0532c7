"""Which threads may change a value while it is looked at: in a process of its own, since the test runner has some."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import threading
from nbdurable.checkpoint.threads import others_run
end = threading.Event()
told = [others_run()]

class Serving:
    __module__ = "ipykernel.iostream"
    def __call__(self):
        end.wait(60)

for target in (Serving(), end.wait):
    threading.Thread(target=target, daemon=True).start()
    told.append(others_run())
print(told)
"""


def test_only_threads_of_the_notebook_count() -> None:
    """The kernel's own threads, and ours, change nothing; any other may."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[False, False, True]"
