"""The screen of progress, and its lines where there is no terminal."""

import io
import logging
from dataclasses import replace

import pytest
from rich.console import Console

from metr.training.progress import Progress, Snapshot, one_line, screen

TERMS = {"presence/0": 0.5, "decoder.0/l1": 1.0, "decoder.1/l1": 2.0}
SNAPSHOT = Snapshot(
    step=1200,
    steps=10_000,
    images_per_second=12.34,
    seconds_left=3725.4,
    memory=3.21,
    learning_rate={"backbone": 1e-5, "rest": 1e-4},
    epochs={"bccd": 2.5, "aquarium": 4.0},
    metrics={"AP": 31.25},
    evaluated_step=1000,
    skipped=2,
)


def rendered(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def terminal(width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)


def test_the_screen_tells_everything() -> None:
    console = terminal()
    console.print(screen(SNAPSHOT, {"presence": 0.5, "decoder/l1": 3.0}, "evaluating"))
    shown = rendered(console)
    for words in (
        "step 1,200 of 10,000", "1:02:05 left", "12.3 images/s", "3.2 GiB", "backbone 1.0e-05, rest 1.0e-04",
        "2 steps skipped", "total", "3.500", "3.000", "evaluation at step 1000", "31.25", "times seen", "bccd",
        "2.5", "evaluating",
    ):  # fmt: skip
        assert words in shown, words
    assert len(shown.splitlines()) < 12, "one screen"


def test_a_terminal_gets_a_live_screen() -> None:
    console = terminal()
    with Progress(console, seconds=1000.0) as progress:
        progress.update(SNAPSHOT)
        progress.update(replace(SNAPSHOT, step=1201))
        with progress.activity("evaluating"):
            pass
    assert "step 1,201 of 10,000" in rendered(console)


def test_elsewhere_there_are_lines_every_so_often(caplog: pytest.LogCaptureFixture) -> None:
    console = Console(file=io.StringIO(), force_terminal=False)
    with caplog.at_level(logging.INFO), Progress(console, seconds=1000.0) as progress:
        for _ in range(5):
            progress.smooth(TERMS)
            progress.update(SNAPSHOT)
        assert not caplog.messages, "the time of a line has not come"
        progress.seconds = 0.0
        progress.update(SNAPSHOT)
    assert caplog.messages == [one_line(SNAPSHOT, 3.5)]
    assert caplog.messages[0] == ("step 1200/10000, loss 3.500, 12.3 images/s, 1:02:05 left, 3.2 GiB, 2 skipped")
    assert rendered(console) == ""
