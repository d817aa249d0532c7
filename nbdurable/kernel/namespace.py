"""Which names of a kernel's namespace are the kernel's own, and which are the notebook's."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

_KEPT_BY_IPYTHON = re.compile(r"_+|_i+|_\d+|_i\d+|_[doi]h|_exit_code|__\w+__|In|Out|exit|quit|get_ipython")


def is_kernels_own(shell: Any) -> Callable[[str], bool]:
    """Return a test for names that no checkpoint holds: history, the shell's own, and what it hides."""
    hidden = dict(shell.user_ns_hidden)

    def ignore(name: str) -> bool:
        if _KEPT_BY_IPYTHON.fullmatch(name):
            return True
        return name in hidden and shell.user_ns.get(name) is hidden[name]

    return ignore
