"""The command `nbdurable`: what people and scripts type.

Owns the commands, what they print and their exit statuses; knows the coordinator only through the client.
`main` is the entry point. Importing this loads Typer and nothing heavier.
"""

from __future__ import annotations

from nbdurable.cli.commands import app, main

__all__ = ["app", "main"]
