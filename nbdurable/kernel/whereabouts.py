"""Which notebook this kernel belongs to.

Owns the sources of that fact (Jupyter's environment, VS Code's variable, the Jupyter server); knows nothing of runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import urllib.request
from pathlib import Path
from typing import Any

from nbdurable.models import JSON

CONSOLE = "(console)"  # stands for the notebook where there is none: one per working directory


def notebook_path(namespace: dict[str, Any]) -> Path:
    """Return the absolute path of the notebook, or `<working directory>/(console)` where there is none."""
    candidates = [
        namespace.get("__vsc_ipynb_file__"),
        namespace.get("__session__"),
        os.environ.get("JPY_SESSION_NAME"),
    ]
    for candidate in candidates:
        if candidate and str(candidate).endswith(".ipynb"):
            path = Path(candidate).absolute()
            if path.exists():
                return path
            # Renamed since the kernel was started: Jupyter keeps the old name in the environment.
            return _ask_server() or path
    return _ask_server() or Path.cwd() / CONSOLE


def _ask_server() -> Path | None:
    """Ask the Jupyter server that started this kernel for the notebook's path now."""
    with contextlib.suppress(
        Exception
    ):  # a courtesy: without the answer the name from the environment serves
        from ipykernel.connect import get_connection_file
        from jupyter_core.paths import jupyter_runtime_dir

        kernel_id = re.sub(r"^kernel-|\.json$", "", Path(get_connection_file()).name)
        file = Path(jupyter_runtime_dir()) / f"jpserver-{os.getppid()}.json"
        if not file.exists():
            return None
        server = json.loads(file.read_text())
        request = urllib.request.Request(
            f"{server['url']}api/sessions", headers={"Authorization": f"token {server['token']}"}
        )
        with urllib.request.urlopen(request, timeout=2) as answer:
            sessions: list[dict[str, JSON]] = json.load(answer)
        for session in sessions:
            if session["kernel"]["id"] == kernel_id and session["path"].endswith(".ipynb"):
                return Path(server["root_dir"], session["path"])
    return None
