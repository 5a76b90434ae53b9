"""log.txt: what was logged and shown, session after session, and nothing of a command that is refused."""

import logging
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from metr.errors import MetrError
from metr.run_directory import RunDirectory
from metr.training.config import load_recipe
from metr.training.run_log import LOG_FILE, RunLog, log_page, tell
from metr.training.train import train

from tiny import TinyRun

LOGGER = logging.getLogger("metr.of_this_test")


def lines_of(folder: Path) -> list[str]:
    """The lines of a log, without their times."""
    text = RunDirectory(folder).log.read_text(encoding="utf-8")
    return [line[20:] if line[:2] == "20" else line for line in text.splitlines()]


def test_everything_from_the_beginning_is_there_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    console = Console(file=StringIO(), width=40)
    with caplog.at_level(logging.INFO, logger="metr"):
        with RunLog(tmp_path / "run") as log:
            LOGGER.info("opened before the run begins")
            assert not (tmp_path / "run").exists(), "a refused command leaves nothing"
            log.begin("cpu")
            LOGGER.warning("an image cannot be read")
            tell(console, "a line that is much longer than the forty columns of this console")
            with log_page() as page:
                page.print("on paper alone")
        LOGGER.info("after the run")
    lines = lines_of(tmp_path / "run")
    assert lines[0].startswith("metr ")
    assert "torch " in lines[0]
    assert "python " in lines[0]
    assert lines[1].startswith("command: ")
    assert lines[3:] == [
        "opened before the run begins",
        "device: " + lines[4].removeprefix("device: "),
        "warning: an image cannot be read",
        "a line that is much longer than the forty columns of this console",
        "on paper alone",
    ]
    assert lines[4].startswith("device: cpu")
    assert "on paper" not in console.file.getvalue()  # type: ignore[attr-defined]
    assert not any(isinstance(handler, RunLog) for handler in LOG_FILE.handlers)


def failing(folder: Path, error: Exception) -> None:
    """A session that begins and ends with this error."""
    with RunLog(folder) as log:
        log.begin("cpu")
        raise error


def test_an_error_is_the_last_line_and_a_second_session_is_appended(tmp_path: Path) -> None:
    with pytest.raises(MetrError):
        failing(tmp_path, MetrError("numbers are not finite", where="step 7", hint="lower the rate"))
    assert lines_of(tmp_path)[-2:] == ["error: step 7: numbers are not finite", "  try: lower the rate"]
    with pytest.raises(ZeroDivisionError):
        failing(tmp_path, ZeroDivisionError())
    lines = lines_of(tmp_path)
    assert sum(line.startswith("command: ") for line in lines) == 2
    assert "error: step 7: numbers are not finite" in lines
    assert lines[-1] == "ZeroDivisionError"
    assert "Traceback" in " ".join(lines)


def test_nothing_is_written_of_a_command_that_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MetrError), RunLog(tmp_path / "run"):
        raise MetrError("a run is in this folder already")
    assert not (tmp_path / "run").exists()


def test_a_training_run_logs_its_plan_progress_tables_and_end(
    tiny_run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = load_recipe("nano", tiny_run.recipe, ["train.loop.progress_seconds=0.001"])
    for steps in (2, 3):
        longer = recipe.model_copy(
            update={
                "train": recipe.train.model_copy(update={"loop": recipe.train.loop.model_copy(update={"steps": steps})})
            }
        )
        with caplog.at_level(logging.INFO):
            train(tiny_run.data[:2], tmp_path / "run", longer, resume=steps == 3)
    lines = lines_of(tmp_path / "run")
    for part in (
        "dataset ",
        "names: 7, 0 of them",
        "step 1/2, loss ",
        "average precision, COCO protocol",
        "pond ",
        "evaluation at step 2: AP",
        "Done: 2 steps",
        "going on after step 2",
        "step 3/3, loss",
        "Done: 3 steps",
    ):
        assert any(line.startswith(part) for line in lines), part


def test_a_refused_run_leaves_the_log_of_the_run_alone(tiny_run: TinyRun) -> None:
    before = RunDirectory(tiny_run.folder).log.read_bytes()
    with pytest.raises(MetrError, match="a run is in this folder already"):
        train(tiny_run.data, tiny_run.folder, load_recipe("nano", tiny_run.recipe))
    assert RunDirectory(tiny_run.folder).log.read_bytes() == before
