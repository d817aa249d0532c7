"""What a cell displays: recorded while it streams, and displayed again on a restore.

Owns `Recorder` (taps on display publisher, display hook, stdout and stderr) and `replay`. An output is a dict as
nbformat 4.5 has it (stream, display_data, execute_result), plus `display_id` where there was one. Knows nothing of
steps.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from nbdurable.checkpoint.blobs import BlobStore
from nbdurable.checkpoint.manifest import Manifest, read_blob

Output = dict[str, Any]

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"

_also: ContextVar[tuple[Recorder, ...]] = ContextVar("nbdurable_listening", default=())


class Recorder:
    """Copies what a cell displays, in order, while it goes to the front end as always.

    Display messages of other threads are left out (comm handlers run in them); what other threads print is kept.
    What a task of an earlier cell prints is shown below that cell, and is left out.
    """

    def __init__(self) -> None:
        self.outputs: list[Output] = []
        self._clear_next = False
        self._muted = False
        self._lock = threading.Lock()

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Note nothing that is printed in the block: it is the text form of a display."""
        self._muted = True
        try:
            yield
        finally:
            self._muted = False

    def stream(self, name: str, text: str) -> None:
        """Note printed text; text that follows text of the same stream joins it."""
        if text and not self._muted:
            for recorder in (self, *_also.get()):
                recorder._stream(name, text)

    def _stream(self, name: str, text: str) -> None:
        with self._lock:
            self._clear_if_asked()
            if self.outputs and self.outputs[-1].get("name") == name:
                self.outputs[-1]["chunks"].append(text)
            else:
                self.outputs.append({"output_type": "stream", "name": name, "chunks": [text]})

    def display(
        self, kind: str, data: dict[str, Any], metadata: dict[str, Any], display_id: str | None
    ) -> None:
        """Note a display (kind: display_data, execute_result or update_display_data)."""
        for recorder in (self, *_also.get()):
            recorder._display(kind, data, metadata, display_id)

    def _display(
        self, kind: str, data: dict[str, Any], metadata: dict[str, Any], display_id: str | None
    ) -> None:
        widget = (data.get(WIDGET_VIEW) or {}).get("model_id")
        data = {mime: value for mime, value in data.items() if mime != WIDGET_VIEW}
        metadata = dict(metadata or {})
        with self._lock:
            if kind == "update_display_data":
                for shown in self.outputs:
                    if display_id is not None and shown.get("display_id") == display_id:
                        shown.update(data=data, metadata=metadata)
                return
            self._clear_if_asked()
            if not data:
                return
            output: Output = {"output_type": kind, "data": data, "metadata": metadata}
            if display_id is not None:
                output["display_id"] = display_id
            if widget is not None:
                output["widget"] = widget
            self.outputs.append(output)

    def back_to(self, outputs: list[Output]) -> None:
        """Forget what was displayed, but for these outputs, given as `finished` returns them."""
        with self._lock:
            self._clear_next = False
            self.outputs = [
                {"output_type": "stream", "name": output["name"], "chunks": [output["text"]]}
                if output["output_type"] == "stream"
                else dict(output)
                for output in outputs
            ]

    def clear(self, wait: bool) -> None:
        """Note `clear_output`."""
        for recorder in (self, *_also.get()):
            recorder._clear(wait)

    def _clear(self, wait: bool) -> None:
        with self._lock:
            self._clear_next = wait
            if not wait:
                self.outputs.clear()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note, too, what is displayed in the block, by this thread or task alone, while another recorder taps."""
        token = _also.set((*_also.get(), self))
        try:
            yield
        finally:
            _also.reset(token)

    def finished(self) -> list[Output]:
        """Return the outputs so far, as plain JSON; a widget as the text that it shows now."""
        found: list[Output] = []
        with self._lock:
            for output in self.outputs:
                match output:
                    case {"chunks": chunks, "name": name}:
                        found.append({"output_type": "stream", "name": name, "text": "".join(chunks)})
                    case {"widget": model_id, **rest}:
                        text = _widget_text(model_id, rest["data"])
                        found += [{**rest, "data": text}] if text else []
                    case _:
                        found.append(dict(output))
        return found

    def _clear_if_asked(self) -> None:
        if self._clear_next:
            self._clear_next = False
            self.outputs.clear()

    # Taps -------------------------------------------------------------------------------------------------

    def on_message(self, message: dict[str, Any]) -> dict[str, Any]:
        """Copy one outgoing display message of a kernel, as an ipykernel hook."""
        kind = message.get("msg_type") or message["header"]["msg_type"]
        content = message["content"]
        if kind == "clear_output":
            self.clear(bool(content.get("wait")))
        elif kind in ("display_data", "update_display_data", "execute_result"):
            display_id = (content.get("transient") or {}).get("display_id")
            self.display(kind, content["data"], content.get("metadata") or {}, display_id)
        return message


def _widget_text(model_id: str, shown: dict[str, Any]) -> dict[str, Any]:
    """Return what a front end without widgets shows of a widget now; nothing of one that was closed."""
    registry = getattr(sys.modules.get("ipywidgets.widgets.widget"), "_instances", None)
    if registry is None:
        return shown
    widget = registry.get(model_id)
    data = widget._repr_mimebundle_() if widget is not None else {}
    return {mime: value for mime, value in data.items() if mime != WIDGET_VIEW}


@contextmanager
def recording(shell: Any, recorder: Recorder) -> Iterator[None]:
    """Tap a shell's displays and streams for the time of the block."""
    undo: list[Callable[[], None]] = []
    try:
        if hasattr(shell.display_pub, "register_hook"):
            for source in (shell.display_pub, shell.displayhook):
                source.register_hook(recorder.on_message)
                undo.append(partial(source.unregister_hook, recorder.on_message))
        else:
            undo.append(_tap_plain_displays(shell, recorder))
        for name in ("stdout", "stderr"):
            undo.append(_tap_stream(name, recorder))
        yield
    finally:
        for step in reversed(undo):
            step()


def _tap_stream(name: str, recorder: Recorder) -> Callable[[], None]:
    stream: Any = getattr(sys, name)
    write, cell = stream.write, _cell_of(stream)

    def tapped(text: str) -> Any:
        if _cell_of(stream) == cell:
            recorder.stream(name, text)
        return write(text)

    try:
        stream.write = tapped  # a logging handler may hold the stream itself
        return lambda: _untap(stream, tapped, write)
    except AttributeError:
        setattr(sys, name, _Tee(stream, tapped))
        return lambda: setattr(sys, name, stream)


def _cell_of(stream: Any) -> str | None:
    """Return the message below which a kernel's stream shows what is printed now, from this thread and task."""
    return (getattr(stream, "parent_header", None) or {}).get("msg_id")


def _untap(stream: Any, tapped: Any, write: Any) -> None:
    if stream.write is tapped:  # else somebody has put something over it meanwhile
        stream.write = write  # IPython's own copy for the history, mostly


class _Tee:
    """A stream that can't be tapped in place (a terminal's), with another `write`."""

    def __init__(self, stream: Any, write: Callable[[str], Any]) -> None:
        self._stream = stream
        self.write = write

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _tap_plain_displays(shell: Any, recorder: Recorder) -> Callable[[], None]:
    """Tap the publisher and the display hook of plain IPython, which have no hooks and print to stdout."""
    publisher, hook = shell.display_pub, shell.displayhook
    publish, write_format = publisher.publish, hook.write_format_data

    def tapped_publish(data: Any, metadata: Any = None, *args: Any, **kwargs: Any) -> Any:
        kind = "update_display_data" if kwargs.get("update") else "display_data"
        with recorder.muted():
            result = publish(data, metadata, *args, **kwargs)
        recorder.display(kind, data, metadata or {}, (kwargs.get("transient") or {}).get("display_id"))
        return result

    def tapped_write(format_dict: Any, md_dict: Any = None) -> Any:
        with recorder.muted():
            result = write_format(format_dict, md_dict)
        recorder.display("execute_result", format_dict, md_dict or {}, None)
        return result

    publisher.publish, hook.write_format_data = tapped_publish, tapped_write

    def undo() -> None:
        del publisher.publish
        del hook.write_format_data

    return undo


def outputs_of(manifest: Manifest, blobs: BlobStore) -> list[Output]:
    """Return what a checkpoint's step displayed; raises BlobMissing, BlobDamaged."""
    found: list[Output] = json.loads(bytes(read_blob(manifest.outputs, blobs))) if manifest.outputs else []
    return found


def replay(shell: Any, outputs: list[Output]) -> None:
    """Display recorded outputs again, in order, as the cell that runs now."""
    last: Any = None  # the stream that was written to last
    for output in outputs:
        match output["output_type"]:
            case "stream":
                stream = getattr(sys, output["name"])
                if last not in (None, stream):
                    last.flush()  # a display, and the end of a cell, do so by themselves
                last = stream
                stream.write(output["text"])
            case "display_data":
                transient = {"display_id": output["display_id"]} if "display_id" in output else None
                shell.display_pub.publish(output["data"], output["metadata"], transient=transient)
            case "execute_result":
                hook = shell.displayhook
                hook.start_displayhook()
                hook.write_output_prompt()
                hook.write_format_data(output["data"], output["metadata"])
                hook.finish_displayhook()
