"""What nbdurable itself says in a cell: the one quiet line of a step, and the card of an approval.

Owns words and markup; decides nothing. Everything also has a text form, for consoles and saved notebooks.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from html import escape
from typing import Any

from nbdurable.models import Variable, Wait, WaitStatus
from nbdurable.policies import size
from nbdurable.settings import Home, Settings

APPROVAL_MIME = "application/vnd.nbdurable.approval+json"
_SHOWN = 4
_BAR = 20  # characters of a progress bar
_QUIET = (
    "font: 12px/1.5 var(--jp-code-font-family, ui-monospace, monospace); white-space: pre-wrap; opacity: .72"
)
_HANGING = "padding-left: 4ch; text-indent: -4ch"  # a line that is too long goes on below its text
_NOT_SHOWN = {"module", "function", "type"}  # imports and definitions: they stand in the cell


def say(shell: Any, text: str) -> None:
    """Display a quiet line (or a few) below the cell's own output."""
    lines = "".join(f'<div style="{_HANGING}">{escape(line) or "&nbsp;"}</div>' for line in text.splitlines())
    data = {"text/plain": text, "text/html": f'<div style="{_QUIET}">{lines}</div>'}
    shell.display_pub.publish(data, {"nbdurable": {"note": True}})


def summary(variables: Iterable[Variable]) -> str:
    """Sum up the values that a checkpoint holds: `results list[10] 42 kB · draft str 3 kB · and 3 more`."""
    variables = tuple(variables)
    saved = [v for v in variables if v.state == "saved" and v.type not in _NOT_SHOWN]
    made = [f"{v.name} {v.reason}" for v in variables if v.state == "recipe"]
    return few([*made, *(f"{v.name} {_kind(v)} {size(v.bytes)}" for v in saved)], " · ")


def one_line(text: str, width: int = 100) -> str:
    """Return a text on one line, cut to a width."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def few(parts: list[str], between: str = ", ") -> str:
    """Name the first of many things, and how many more there are."""
    more = [f"and {len(parts) - _SHOWN} more"] if len(parts) > _SHOWN else []
    return between.join(parts[:_SHOWN] + more)


def _kind(variable: Variable) -> str:
    """Write a type with its shape: `list[10]`, `DataFrame 3 × 1,`."""
    if not variable.shape:
        return variable.type
    return f"{variable.type} {variable.shape}," if variable.shape[-1].isdigit() else variable.shape


def notices(variables: Iterable[Variable]) -> list[str]:
    """Name each variable that was not saved, with the reason and what to do."""
    return [f"{v.name} not saved: {v.reason}" for v in variables if v.state == "unsaved"]


def progress(desc: str, done: int, failed: int, total: int | None, *, ended: bool = False) -> dict[str, Any]:
    """Return how far something has come as a display: a bar, how many of how many, how many of them failed."""
    told = f"{done}/{total}" if total is not None else f"{done}"
    told += f", {failed} failed" if failed else ""
    full = _BAR * done // total if total else _BAR if ended else 0
    bar = f"{'━' * full}{'╌' * (_BAR - full)}"
    share = f' value="{done}" max="{total}"' if total else ' value="1" max="1"' if ended else ""
    html = f'<div style="{_QUIET}">{escape(desc)}  <progress{share}></progress>  {escape(told)}</div>'
    return {"text/plain": f"{desc}  {bar}  {told}", "text/html": html}


def clock(at: float) -> str:
    """Write a moment for people, in the local time zone."""
    moment = datetime.fromtimestamp(at).astimezone()
    today = datetime.now().astimezone().date()
    return moment.strftime("%H:%M") if moment.date() == today else moment.strftime("%Y-%m-%d %H:%M")


def pages(home: Home, settings: Settings) -> str:
    """Return the address under which others reach the pages, or would once they are up."""
    return settings.pages_url.rstrip("/") or home.served() or f"http://127.0.0.1:{settings.dashboard_port}"


def _page(home: Home, wait: Wait) -> str | None:
    """Return the address of the approval's page, where pages are served now."""
    url = home.served()
    return f"{url}/ui/approvals/{wait.id}" if url else None


def decided(wait: Wait) -> str:
    """Say who decided what, and when."""
    answer = wait.answer
    if answer is not None and answer.timed_out:
        return f"not answered until {clock(wait.deadline_at or answer.at)}"
    if answer is None:
        return "cancelled" if wait.status is WaitStatus.CANCELLED else "open"
    word = ("approved with edits" if answer.edited else "approved") if answer.approved else "rejected"
    comment = f": {answer.comment}" if answer.comment else ""
    return f"{word} by {answer.by}, {clock(answer.at)}{comment}"


def _terms(wait: Wait) -> str:
    """Say who is asked, and until when."""
    terms = [f"asks {', '.join(wait.reviewers)}"] if wait.reviewers else []
    if wait.deadline_at is not None:
        default = wait.default
        then = (
            ""
            if default is None
            else ", then it is approved"
            if default.approved
            else ", then it is rejected"
        )
        terms.append(f"until {clock(wait.deadline_at)}{then}")
    return " · ".join(terms)


def card(wait: Wait, home: Home) -> dict[str, Any]:
    """Return an approval as a display: our MIME type (no secrets), HTML that means something when saved, and text."""
    is_open = wait.status is WaitStatus.OPEN
    page = _page(home, wait) if is_open else None
    needs_value = " --value JSON" if wait.form is not None and wait.value is None else ""
    commands = [f"nbdurable approve {wait.id}{needs_value}", f"nbdurable reject {wait.id}"]
    value = wait.preview
    approved = wait.answer is not None and wait.answer.approved
    mark, colour = ("⏸", "#c98a00") if is_open else ("✓", "#2e7d32") if approved else ("✗", "#b3261e")
    text = [f"{mark} {wait.title}"]
    text += [f"    {line}" for line in value.splitlines()]
    text.append(f"  {'   ·   '.join(commands)}" if is_open else f"  {decided(wait)}")
    if page:
        text.append(f"  or {page}")
    terms = _terms(wait) if is_open else ""
    if terms:
        text.append(f"  {terms}")
    state = (
        " · ".join(f"<code>{escape(command)}</code>" for command in commands)
        + (f'<br>or <a href="{escape(page)}">open its page</a>' if page else "")
        if is_open
        else f"{mark} {escape(decided(wait))}"
    )
    html = (
        f'<div style="border: 1px solid #8885; border-left: 4px solid {colour}; border-radius: 4px; '
        'padding: 8px 12px; max-width: 60em">'
        f"<div><strong>{escape(wait.title)}</strong></div>"
        f'<pre style="white-space: pre-wrap; max-height: 24em; overflow: auto; margin: 8px 0">{escape(value)}</pre>'
        f"<div>{state}</div>{f'<div>{escape(terms)}</div>' if terms else ''}</div>"
    )
    public = {"wait": wait.id, "run": wait.run_id, "title": wait.title, "status": wait.status.value}
    if wait.answer is not None:
        public["decision"] = decided(wait)
    return {APPROVAL_MIME: public, "text/html": html, "text/plain": "\n".join(text)}
