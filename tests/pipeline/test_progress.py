"""What a running job shows, on a terminal and in a log."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from rich.console import Console
from rich.text import Text

from counterweight.pipeline.events import (
    BlockDone,
    Doing,
    Expected,
    Note,
    Planned,
    StageEntered,
    Summary,
    TaskStarted,
    WindowsDone,
)
from counterweight.pipeline.progress import LiveProgress, PlainProgress, Progress, make_progress
from counterweight.pipeline.remaining import BlockCount

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


class Clock:
    """A clock that only the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def done(progress: Progress, index: int, *, before: float | None = 0.012, after: float | None = 0.0081) -> None:
    progress.on(BlockDone(index, 0.44, 612 << 20, before, after, reused=False))


def reused(progress: Progress, index: int) -> None:
    progress.on(BlockDone(index, 9, 9 << 30, 0.1, 0.05, reused=True))


def started(progress: Progress, index: int, worker: int) -> None:
    progress.on(TaskStarted(f"block {index} (forward)", "forward", worker, index))


class TestPlain:
    def test_a_whole_job_line_by_line(self) -> None:
        stream = io.StringIO()
        with PlainProgress(stream) as progress:
            progress.on(StageEntered("blocks"))
            progress.on(Planned(3, 1))
            reused(progress, 0)
            started(progress, 2, 1)
            started(progress, 1, 0)
            done(progress, 2)
            progress.on(Note("model.layers.1.mlp.up_proj: gptq.damping: raised to 0.1"))
            done(progress, 1)
            progress.on(StageEntered("validate"))
            progress.on(WindowsDone(1, 2))
            progress.on(Summary([("perplexity", "12.31"), ("report", "file:///out/report.html")]))
        assert stream.getvalue().splitlines() == [
            "stage blocks",
            "3 blocks, 1 of them finished before",
            "block 0 reused (1/3), error 1.0e-01 -> 5.0e-02",
            "block 2 started on worker 1",
            "block 1 started on worker 0",
            "block 2 done (2/3) in 0.4 s, peak 612 MiB, error 1.2e-02 -> 8.1e-03",
            "note: model.layers.1.mlp.up_proj: gptq.damping: raised to 0.1",
            "block 1 done (3/3) in 0.4 s, peak 612 MiB, error 1.2e-02 -> 8.1e-03",
            "stage validate",
            "validation 1/2 done",
            "perplexity  12.31",
            "report      file:///out/report.html",
        ]

    @pytest.mark.parametrize(
        ("before", "after", "text"),
        [
            (None, None, "no error measured"),
            (0.5, 0.5, "error 5.0e-01"),
            (0.5, 0.0, "error 5.0e-01 -> 0.0e+00"),
        ],
    )
    def test_errors_that_are_absent_or_equal(self, before: float | None, after: float | None, text: str) -> None:
        stream = io.StringIO()
        progress = PlainProgress(stream)
        progress.on(Planned(1, 0))
        done(progress, 0, before=before, after=after)
        assert stream.getvalue().splitlines()[-1] == f"block 0 done (1/1) in 0.4 s, peak 612 MiB, {text}"

    def test_lines_say_what_is_left_where_a_plan_was_made(self) -> None:
        stream, clock = io.StringIO(), Clock()
        progress = PlainProgress(stream, clock=clock)
        progress.on(Expected({"start": 5.0, "blocks": 20.0, "validate": 10.0}))
        progress.on(StageEntered("blocks"))
        progress.on(Planned(2, 0))
        clock.now += 20
        done(progress, 0)
        clock.now += 20
        done(progress, 1)
        progress.on(StageEntered("validate"))
        clock.now += 5
        progress.on(WindowsDone(1, 4))
        lines = stream.getvalue().splitlines()
        assert lines[0] == "about 35.0 s by its plan, which what is measured corrects"
        ends = [line.rpartition(", about ")[2] for line in lines if line.endswith("left")]
        assert ends == ["40.0 s left", "20.0 s left", "15.0 s left"]

    def test_the_second_half_of_a_block_is_no_event_but_another_worker_is(self) -> None:
        stream = io.StringIO()
        progress = PlainProgress(stream)
        for worker in (0, 0, 1):
            started(progress, 4, worker)
        assert stream.getvalue().splitlines() == [
            "block 4 started on worker 0",
            "block 4 started on worker 1",
        ]

    def test_an_event_is_one_line_without_control_characters(self) -> None:
        stream = io.StringIO()
        progress = PlainProgress(stream)
        progress.on(Note("a\r\nb\x1b[31m\x07 \u202e c"))
        progress.on(Summary([("x\ny", "1\n2   3")]))
        assert stream.getvalue() == "note: a b [31m c\nx y  1 2   3\n"

    def test_every_line_is_flushed(self) -> None:
        raw = io.BytesIO()
        progress = PlainProgress(io.TextIOWrapper(io.BufferedWriter(raw, 1 << 16)))
        progress.on(Note("here"))
        assert raw.getvalue() == b"note: here\n"


class TestLive:
    def console(self, width: int = 100) -> Console:
        return Console(force_terminal=True, file=io.StringIO(), width=width, markup=False)

    def written(self, console: Console) -> str:
        """All that was written, colours taken out."""
        file = console.file
        assert isinstance(file, io.StringIO)
        return Text.from_ansi(file.getvalue()).plain

    def raw(self, console: Console) -> str:
        file = console.file
        assert isinstance(file, io.StringIO)
        return file.getvalue()

    def last_frame(self, console: Console) -> str:
        return self.raw(console).rsplit("\x1b[2K", 1)[-1]

    def test_shows_the_figures(self) -> None:
        console, clock = self.console(), Clock()
        with LiveProgress(console, clock=clock) as progress:
            progress.on(StageEntered("blocks"))
            progress.on(Planned(6, 1))
            reused(progress, 0)
            assert "1/6" in self.written(console)
            assert "time left unknown" in self.written(console)
            started(progress, 1, 3)
            assert "block 1 on worker 3" in self.written(console)
            clock.now += 10
            done(progress, 1)
            frame = self.last_frame(console)
            for figure in (
                "2/6",
                "10.0 s elapsed",
                "40.0 s left",
                "peak 612 MiB",
                "error 1.2e-02 -> 8.1e-03",
            ):
                assert figure in frame
            assert "on worker 3" not in frame
            progress.on(StageEntered("validate"))
            progress.on(WindowsDone(3, 8))
            assert "3/8" in self.last_frame(console)
            progress.on(Summary([("perplexity", "12.31"), ("report", "u" * 300)]))
        assert "u" * 300 in self.raw(console)
        assert "perplexity  12.31" in self.written(console)

    def test_time_is_left_from_the_first_second(self) -> None:
        """As the plan says until a block is measured; then blocks at their pace, and what follows them as much slower."""
        console, clock = self.console(), Clock()

        def left() -> str:
            return self.last_frame(console).partition("elapsed")[2].partition("left")[0].strip()

        with LiveProgress(console, clock=clock) as progress:
            progress.on(Doing("looking at the model and its texts"))
            assert left() == ""
            progress.on(Expected({"start": 5.0, "inventory": 1.0, "blocks": 20.0, "assemble": 2.0, "validate": 10.0}))
            assert left() == "38.0 s"
            clock.now += 3
            progress.on(Doing("loading torch"))
            assert left() == "35.0 s"
            clock.now += 4
            progress.on(StageEntered("inventory"))
            assert left() == "33.0 s", "the start has taken longer, and is over"
            progress.on(StageEntered("blocks"))
            progress.on(Planned(4, 1))
            assert left() == "32.0 s"
            reused(progress, 0)
            assert left() == "27.0 s", "three of four blocks"
            clock.now += 15
            done(progress, 1)
            assert left() == "1 min 06 s", "two blocks of 15 s, 12 s at a third of the pace"
            clock.now += 30
            done(progress, 2)
            done(progress, 3)
            progress.on(StageEntered("validate"))
            assert left() == "30.0 s", "ten, at a third of the pace"
            clock.now += 4
            progress.on(WindowsDone(1, 2))
            assert left() == "4.0 s"
            progress.on(StageEntered("publish"))
            assert left() == "0.0 s"

    def test_the_peak_is_the_largest_of_this_job(self) -> None:
        console = self.console()
        with LiveProgress(console, clock=Clock()) as progress:
            progress.on(Planned(3, 1))
            reused(progress, 0)
            assert "peak" not in self.raw(console)
            for index, size in ((1, 700 << 20), (2, 600 << 20)):
                progress.on(BlockDone(index, 1, size, None, None, reused=False))
        assert "peak 700 MiB" in self.raw(console).rsplit("validation", 1)[-1]
        assert "no error measured" in self.raw(console)

    def test_notes_are_text_not_markup(self) -> None:
        console = Console(force_terminal=True, file=io.StringIO(), width=100)  # markup is on
        with LiveProgress(console, clock=Clock()) as progress:
            progress.on(Note("[bold]x[/bold] \x1b[2J"))
            progress.on(Summary([("[red]label[/red]", "[/nothing]")]))
        written = self.written(console)
        assert "note: [bold]x[/bold] [2J" in written
        assert "[red]label[/red]  [/nothing]" in written
        assert "\x1b[2J" not in self.raw(console)

    def test_lines_stay_within_a_narrow_terminal(self) -> None:
        console = self.console(width=30)
        with LiveProgress(console, clock=Clock()) as progress:
            progress.on(Planned(200, 0))
            for worker in range(40):
                started(progress, worker, worker)
        frames = Text.from_ansi(self.raw(console).replace("\x1b[2K", "\n").replace("\x1b[1A", "")).plain
        assert max(map(len, frames.splitlines())) <= 30

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_an_exception_gives_the_cursor_back(self, error: type[BaseException]) -> None:
        console = self.console()

        def job() -> None:
            with LiveProgress(console, clock=Clock()) as progress:
                progress.on(StageEntered("blocks"))
                assert HIDE in self.raw(console)
                assert SHOW not in self.raw(console)
                raise error

        with pytest.raises(error):
            job()
        assert self.raw(console).count(SHOW) == self.raw(console).count(HIDE) == 1
        assert self.raw(console).rindex(SHOW) > self.raw(console).rindex("blocks")

    def test_stdout_is_left_alone(self, capsys: pytest.CaptureFixture[str]) -> None:
        with LiveProgress(self.console(), clock=Clock()) as progress:
            progress.on(StageEntered("blocks"))
            print("mine")
            progress.on(Summary([("a", "b")]))
        captured = capsys.readouterr()
        assert (captured.out, captured.err) == ("mine\n", "")

    def test_what_libraries_write_to_stderr_goes_above_the_display(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stream = Terminal()
        monkeypatch.setattr(sys, "stderr", stream)
        with make_progress(stream) as progress:
            progress.on(StageEntered("blocks"))
            print("a warning", file=sys.stderr)
            lines = stream.getvalue()
        assert sys.stderr is stream
        # The display is wiped before the warning and drawn again after it.
        assert lines.index("\x1b[2K") < lines.rindex("a warning") < lines.rindex("elapsed")


class TestTimeLeft:
    def test_unknown_until_a_block_of_this_job_is_finished(self) -> None:
        count = BlockCount(4, since=100.0, latest=100.0)
        assert count.left(150.0) is None
        count = count.finished(150.0, reused=True)
        assert count.left(150.0) is None
        assert count.finished(160.0, reused=False).left(160.0) == pytest.approx(2 * 60.0)

    def test_is_the_pace_of_own_blocks_times_those_that_remain(self) -> None:
        count = BlockCount(10, since=0.0, latest=0.0)
        for _ in range(4):
            count = count.finished(0.0, reused=True)
        count = count.finished(6.0, reused=False).finished(10.0, reused=False)
        assert count.left(10.0) == pytest.approx(5.0 * 4)

    def test_counts_down_between_blocks_and_never_below_zero(self) -> None:
        count = BlockCount(3, since=0.0, latest=0.0).finished(10.0, reused=False)
        assert [count.left(now) for now in (10.0, 15.0, 30.0, 90.0)] == pytest.approx([20.0, 15.0, 0.0, 0.0])

    def test_nothing_is_left_at_the_end(self) -> None:
        assert BlockCount(1).finished(5.0, reused=True).left(5.0) == 0.0


class TestChoice:
    def test_a_terminal_gets_the_display(self) -> None:
        stream = Terminal()
        with make_progress(stream) as progress:
            progress.on(StageEntered("blocks"))
        assert isinstance(progress, LiveProgress)
        assert "blocks" in stream.getvalue()

    def test_a_file_gets_lines(self) -> None:
        stream = io.StringIO()
        with make_progress(stream) as progress:
            progress.on(StageEntered("blocks"))
        assert isinstance(progress, PlainProgress)
        assert stream.getvalue() == "stage blocks\n"

    def test_importing_the_module_is_cheap(self) -> None:
        heavy = "('rich', 'torch', 'pydantic')"
        program = f"import sys, counterweight.pipeline.progress; print([m for m in {heavy} if m in sys.modules])"
        output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert output.stdout == "[]\n"
