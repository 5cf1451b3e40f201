"""What a running job shows of its events: on a terminal a display that stays in place, elsewhere one plain line per event.

Everything is written to the stream that `make_progress` is given, which is stderr: stdout belongs to the result.
"""

from __future__ import annotations

import re
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from counterweight.pipeline.events import (
    BlockDone,
    Doing,
    Event,
    Expected,
    FellBack,
    Note,
    Planned,
    StageEntered,
    Summary,
    TaskFinished,
    TaskRetried,
    TaskStarted,
    WindowsDone,
)
from counterweight.pipeline.remaining import BLOCKS, VALIDATE, Clock, Remaining
from counterweight.pipeline.units import bytes_text, seconds_text

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

REFRESHES_PER_SECOND = 4.0
BAR_WIDTH = 40  # characters


class Progress(ABC):
    """Shows a job's events. A context manager: leaving it, in whatever way, gives the terminal back as it was."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    @abstractmethod
    def on(self, event: Event) -> None:
        """Shows an event, or nothing of it."""

    def end(self) -> None:
        """The job's events are over; a summary may follow."""
        return


class Silent(Progress):
    """Shows nothing."""

    def on(self, event: Event) -> None:
        return


def one_line(text: str) -> str:
    """`text` on a single line, without control characters: messages quote names that others chose."""
    marked = "".join(c if c.isprintable() else "\n" for c in text)
    return re.sub(" *\n[ \n]*", " ", marked).strip()


def _errors(quantized: float | None, compensated: float | None) -> str:
    if quantized is None or compensated is None:
        return "no error measured"
    # Equal errors mean that there is no branch: a single figure says so.
    after = "" if compensated == quantized else f" -> {compensated:.1e}"
    return f"error {quantized:.1e}{after}"


def _aligned(lines: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    clean = [(one_line(label), one_line(value)) for label, value in lines]
    width = max((len(label) for label, _ in clean), default=0)
    return [(label.ljust(width), value) for label, value in clean]


class PlainProgress(Progress):
    """One line per event, for logs; each is flushed, so that the last one survives a kill."""

    def __init__(self, stream: TextIO, *, clock: Clock = time.monotonic) -> None:
        self._stream = stream
        self._time = Remaining(clock)
        self._started: dict[int, int] = {}

    def on(self, event: Event) -> None:
        self._time.on(event)
        match event:
            case StageEntered(stage) | Doing(stage):
                self._line(f"stage {one_line(stage)}")
            case Expected(stages):
                self._line(f"about {seconds_text(sum(stages.values()))} by its plan, which what is measured corrects")
            case Planned(blocks, reused):
                self._line(f"{blocks} blocks, {reused} of them finished before")
            # A further task of a block on the worker that did the first is no news.
            case TaskStarted(block=int(block), worker=worker) if self._started.get(block) != worker:
                self._started[block] = worker
                self._line(f"block {block} started on worker {worker}")
            case BlockDone():
                self._block_done(event)
            case WindowsDone(done, total):
                self._line(f"validation {done}/{total} done{self._left()}")
            case Note(text) | TaskRetried(text=text) | FellBack(text=text):
                self._line(f"note: {one_line(text)}")
            case Summary(lines):
                for label, value in _aligned(lines):
                    self._line(f"{label}  {value}")

    def _block_done(self, event: BlockDone) -> None:
        errors = _errors(event.error_quantized, event.error_compensated)
        count = f"({self._time.count.done}/{self._time.count.blocks})"
        if event.reused:
            self._line(f"block {event.block} reused {count}, {errors}")
        else:
            cost = f"in {seconds_text(event.seconds)}, peak {bytes_text(event.peak_bytes)}"
            self._line(f"block {event.block} done {count} {cost}, {errors}{self._left()}")

    def _left(self) -> str:
        left = self._time.left() if self._time.planned else None
        return "" if left is None else f", about {seconds_text(left)} left"

    def _line(self, text: str) -> None:
        self._stream.write(f"{text}\n")
        self._stream.flush()


@dataclass(slots=True)
class _View:
    """What the live display shows. A second thread draws it at any time, so its values are replaced, not changed."""

    stage: str = "starting"
    running: dict[int, int] = field(default_factory=dict)
    """Worker -> the block it is on."""
    peak_bytes: int = 0
    last: str = ""


class LiveProgress(Progress):
    """A few lines at the bottom of a terminal, redrawn in place; notes scroll by above them."""

    def __init__(self, console: Console, *, clock: Clock = time.monotonic) -> None:
        from rich.live import Live

        self._console, self._clock = console, clock
        self._view, self._time = _View(), Remaining(clock)
        self._began = clock()
        self._live = Live(
            console=console,
            get_renderable=self._render,
            refresh_per_second=REFRESHES_PER_SECOND,
            # A library that warns on stderr would tear the display; stdout is not ours to touch.
            redirect_stdout=False,
            redirect_stderr=console.file is sys.stderr,
        )

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def on(self, event: Event) -> None:
        view = self._view
        self._time.on(event)
        match event:
            case StageEntered(stage):
                view.stage = stage
            case Doing(text):
                view.stage = one_line(text)
            case Planned() | Expected() | WindowsDone():
                pass  # in the time that is left, and in the bars
            case TaskStarted(block=int(block), worker=worker):
                view.running = {**view.running, worker: block}
            case TaskFinished(worker=worker):
                view.running = {other: block for other, block in view.running.items() if other != worker}
            case BlockDone():
                self._block_done(event)
            case Note(text) | TaskRetried(text=text) | FellBack(text=text):
                self._note(text)
                return
            case Summary(lines):
                self._finish(lines)
                return
            case _:
                return
        self._live.refresh()

    def _block_done(self, event: BlockDone) -> None:
        view = self._view
        view.running = {worker: block for worker, block in view.running.items() if block != event.block}
        how = "reused" if event.reused else f"in {seconds_text(event.seconds)}"
        view.last = f"block {event.block} {how}, {_errors(event.error_quantized, event.error_compensated)}"
        if not event.reused:  # a reused block's memory was another job's
            view.peak_bytes = max(view.peak_bytes, event.peak_bytes)

    def _note(self, text: str) -> None:
        from rich.text import Text

        self._console.print(Text(f"note: {one_line(text)}", style="yellow"))

    def _finish(self, lines: Sequence[tuple[str, str]]) -> None:
        from rich.text import Text

        self._view.stage = "done"
        self._live.stop()
        for label, value in _aligned(lines):
            # Soft wrapping leaves an address in one piece, so that it can be copied.
            self._console.print(Text.assemble((f"{label}  ", "bold"), value), soft_wrap=True)

    # -- drawing ------------------------------------------------------------------------------------------------

    def _render(self) -> RenderableType:
        from rich.console import Group

        view, now = self._view, self._clock()
        count, validation = self._time.count, self._time.validation
        rows: list[RenderableType] = [self._heading(view.stage, now)]
        if count.blocks:
            rows.append(self._bar("blocks", count.done, count.blocks))
        if validation is not None and validation.total:
            rows.append(self._bar("validation", validation.done, validation.total))
        rows += self._facts()
        return Group(*rows)

    def _heading(self, stage: str, now: float) -> Text:
        from rich.text import Text

        elapsed = f"   {seconds_text(now - self._began)} elapsed"
        line = Text.assemble((one_line(stage), "bold cyan"), elapsed, no_wrap=True, overflow="ellipsis")
        remaining = self._time.left()
        if remaining is not None or (stage in (BLOCKS, VALIDATE) and self._time.count.blocks):
            line.append("   time left unknown" if remaining is None else f"   {seconds_text(remaining)} left")
        return line

    def _bar(self, label: str, done: int, total: int) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 1))
        grid.add_column(width=len("validation"))
        grid.add_column(width=BAR_WIDTH)
        bar = ProgressBar(total=total, completed=done, complete_style="cyan", finished_style="green")
        grid.add_row(Text(label), bar, Text(f"{done}/{total}"))
        return grid

    def _facts(self) -> list[RenderableType]:
        from rich.text import Text

        view = self._view
        facts = []
        if view.running:
            pairs = [f"block {block} on worker {worker}" for worker, block in sorted(view.running.items())]
            facts.append(("running", ", ".join(pairs)))
        if view.last:
            facts.append(("last", view.last))
        if view.peak_bytes:
            facts.append(("memory", f"peak {bytes_text(view.peak_bytes)} in one task"))
        width = len("validation")
        return [
            Text.assemble((f"{label.ljust(width)} ", "dim"), value, no_wrap=True, overflow="ellipsis")
            for label, value in facts
        ]


class JsonProgress(Progress):
    """Events as they are stored, a JSON object a line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def on(self, event: Event) -> None:
        from counterweight.pipeline.event_store import line_of

        self._stream.write(line_of(event).decode())
        self._stream.flush()


class VerboseProgress(Progress):
    """Every event on a line of its own, with the seconds since the first, for whoever looks for the cause of something."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._began: float | None = None

    def on(self, event: Event) -> None:
        began = event.time if self._began is None else self._began
        self._began = began
        told = ", ".join(
            f"{part.name}: {one_line(str(getattr(event, part.name)))}" for part in fields(event) if part.name != "time"
        )
        self._stream.write(f"{event.time - began:8.1f} s  {event.kind}  {told}\n")
        self._stream.flush()


def make_progress(stream: TextIO, *, verbose: bool | None = None, json: bool = False) -> Progress:
    """The live display when `stream` is a terminal, plain lines otherwise. verbose: True for every event, False for nothing;
    json: every event as a JSON object."""
    if json:
        return JsonProgress(stream)
    if verbose is not None:
        return VerboseProgress(stream) if verbose else Silent()
    if not stream.isatty():
        return PlainProgress(stream)
    from rich.console import Console

    return LiveProgress(Console(file=stream, highlight=False, markup=False, emoji=False))
