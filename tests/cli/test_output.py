"""What a reader of piped output gets: no line wrapped, nothing padded, no level names before information."""

import io
import logging
import sys
from pathlib import Path

import pytest

from metr.cli.output import LogHandler, Once, SafeConsole

from tiny import CommandLine, TinyRun, train_arguments


def logger_to(handler: logging.Handler) -> logging.Logger:
    logger = logging.Logger("metr.of_this_test", logging.INFO)
    logger.addHandler(handler)
    return logger


def test_messages_are_lines_and_only_warnings_say_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logger_to(LogHandler())
    logger.info("step %d of %s", 3, "a long run " * 20)
    logger.warning("an image cannot be read")
    logger.error("it ends here")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"step 3 of {'a long run ' * 20}",
        "warning: an image cannot be read",
        "error: it ends here",
    ]


def test_a_warning_is_yellow_on_a_terminal_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    logger_to(LogHandler()).warning("odd")
    assert capsys.readouterr().err == "\x1b[33mwarning: odd\x1b[0m\n"
    monkeypatch.setenv("NO_COLOR", "1")
    logger_to(LogHandler()).warning("odd")
    assert capsys.readouterr().err == "warning: odd\n"


def test_what_reading_data_says_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    """A command may open a dataset several times. What others say may be news each time."""
    handler = LogHandler()
    handler.addFilter(Once())
    for name, times in (("metr.data.other_formats", 1), ("metr.training.train", 2)):
        logger = logging.Logger(name)
        logger.addHandler(handler)
        for _ in range(2):
            logger.warning("%s: it also fits csv", "cards")
        assert capsys.readouterr().err == "warning: cards: it also fits csv\n" * times


def check_lines(said: str) -> None:
    """No blank beginning, no heading above nothing, no padding as wide as a terminal."""
    lines = said.splitlines()
    assert lines
    assert lines[0].strip()
    assert not [line for line in lines if line.startswith("INFO")]
    assert not [line for line in lines if len(line) == 80 and line.endswith("  ")]


def test_piped_tables_are_not_wrapped_at_80_columns(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    named = [f"a_dataset_with_quite_a_long_name_{'x' * 20}_{row}={path}" for row, path in enumerate(tiny_run.data)]
    ended = metr("evaluate", tiny_run.folder, *named, "-o", tmp_path / "judged")
    check_lines(ended.out)
    for name in (one.partition("=")[0] for one in named):
        assert any(line.startswith(f"{name} ") for line in ended.out.splitlines()), ended.out
    planned = metr(*train_arguments(tiny_run, tmp_path / "run", *named[:1], "--dry-run"))
    check_lines(planned.out)
    assert any(line.startswith(named[0].partition("=")[0] + " ") for line in planned.out.splitlines()), planned.out


def test_detect_and_transfer_begin_at_once(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    check_lines(metr("detect", tiny_run.folder, tiny_run.unseen[0], "-o", tmp_path / "found").out)
    check_lines(metr("transfer", tiny_run.folder, "--to", "rt_detr", "-o", tmp_path / "detector").out)


@pytest.mark.parametrize(("terminal", "wide"), [(False, 80), (True, 120)])
def test_a_title_is_a_line_of_the_terminal_or_of_eighty_characters(terminal: bool, wide: int) -> None:
    """Where there is no terminal lines have no limit, and this one filled hundreds of screens."""
    page = io.StringIO()
    console = SafeConsole(file=page, width=120 if terminal else 100_000, force_terminal=terminal, color_system=None)
    console.rule("how good is it?")
    console.print("word " * 30, soft_wrap=True)
    first, second, *_ = page.getvalue().splitlines()
    assert len(first) == wide
    assert " how good is it? " in first
    assert len(second) == 150, "other lines have no limit"
