"""The command `nbdurable`: what people and scripts type.

Owns the commands, what they print and their exit statuses; knows the coordinator only through the client.
`main` is the entry point. The commands load Typer and nothing heavier.
"""

from __future__ import annotations

from collections.abc import Sequence

INTERRUPTED = 130  # as shells report a process that Ctrl-C ended

__all__ = ["INTERRUPTED", "main"]


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status; Ctrl-C shows no traceback, not even while it is loaded."""
    try:
        from nbdurable.cli import commands
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    commands.main(words)
