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


def test_the_last_screen_shows_the_last_evaluation() -> None:
    console = terminal()
    with Progress(console, seconds=1000.0) as progress:
        progress.update(replace(SNAPSHOT, step=SNAPSHOT.steps))
        progress.evaluated({"AP": 44.44}, SNAPSHOT.steps)
    last = rendered(console).split("step 10,000 of 10,000")[-1]
    assert "evaluation at step 10000" in last
    assert "44.44" in last
    assert "1:02:05" not in last


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


NUMBERS = (
    0.0,
    3e-9,
    0.004,
    0.5,
    9.999,
    31.25,
    123.456,
    99_999.99,
    123_456.7,
    2.5e12,
    -17.25,
    float("nan"),
    float("inf"),
)


def magnitudes(width: int, value: float, names: int) -> tuple[list[str], str]:
    """A screen with one number everywhere, and names of so many letters: its lines, and all that a wide one has."""
    kinds = ("classification", "l1", "giou", "quality")
    losses = {f"{part}/{kind}": value for part in ("decoder", "denoising", "proposals") for kind in kinds}
    snapshot = replace(
        SNAPSHOT,
        step=999_900,
        steps=10_000_000,
        seconds_left=3e6,
        images_per_second=value,
        memory=77.7,
        learning_rate={"backbone": 6e-5, "encoder": 2.25e-4, "rest": 6e-4},
        metrics={f"AP {letter * names}": value for letter in "abcdefgh"},
        epochs={letter * names: value for letter in "abcdef"},
        evaluated_step=990_000,
    )
    shown = []
    for columns in (width, 2000):
        console = terminal(columns)
        console.print(screen(snapshot, {**losses, "presence": value}, "evaluating at step 990000"))
        shown.append(rendered(console))
    return shown[0].splitlines(), shown[1]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
@pytest.mark.parametrize("names", [4, 18, 60])
def test_no_number_is_cut_on_a_narrow_terminal(width: int, names: int) -> None:
    for value in NUMBERS:
        check_whole_numbers(width, value, names)


def check_whole_numbers(width: int, value: float, names: int) -> None:
    lines, whole = magnitudes(width, value, names)
    known = set(whole.split())
    assert all(len(line.rstrip()) <= width for line in lines)
    for line in lines:
        for word in line.split():
            if any(letter.isdigit() for letter in word) or "nan" in word or "inf" in word:
                assert word in known, f"{word!r} is cut"
    text = "\n".join(lines)
    assert "total" in text
    assert "step 999,900 of 10,000,000" in text
    assert "…" not in text.replace("AP ", "") or names > 10, "short names are whole"


@pytest.mark.parametrize(
    ("width", "there", "gone"),
    [
        (140, ["classification", "quality", "times seen", "evaluation at step 1000"], []),
        (80, ["sum", "times seen", "evaluation at step 1000"], ["quality"]),
        (60, ["sum", "evaluation at step 1000", "31.25"], ["classification"]),
    ],
)
def test_the_least_important_columns_go_first(width: int, there: list[str], gone: list[str]) -> None:
    kinds = ("classification", "l1", "giou", "quality")
    losses = {f"{part}/{kind}": 12.345 for part in ("decoder", "denoising") for kind in kinds}
    snapshot = replace(SNAPSHOT, metrics={"AP": 31.25, "AP joint vocabulary": 30.0})
    console = terminal(width)
    console.print(screen(snapshot, losses))
    shown = rendered(console)
    assert [word for word in there if word not in shown] == []
    assert [word for word in gone if word in shown] == []
