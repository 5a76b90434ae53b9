"""The header of a run fits on a screen; the end says what is best, where everything is, and what to do next."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from metr.data.joint import open_joint
from metr.run_directory import RunDirectory
from metr.training.config import load_recipe
from metr.training.parts import Outcome
from metr.training.plan import header, tell_end

from tiny import TinyRun


def shown(*parts: object, width: int = 200) -> list[str]:
    console = Console(file=StringIO(), width=width)
    console.print(*parts)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text.splitlines()


def test_the_header_is_short_whatever_differs(tiny_run: TinyRun) -> None:
    data = [f"{letter}={tiny_run.data[0]}" for letter in "abcdefgh"]
    joint, base = open_joint(data), load_recipe("nano")
    lines = shown(header(joint, load_recipe("nano", tiny_run.recipe), base, "the recipe nano"))
    assert len(lines) <= 14
    assert lines[0].startswith("dataset ")
    assert [line.split()[0] for line in lines[1:5]] == ["a", "b", "c", "and"]
    assert lines[4].startswith("and 5 more ")
    assert "20 " in lines[4], "training images of the five"
    assert lines[-1].startswith("  and ")
    assert lines[-1].endswith(" more in config.yaml")
    few = shown(header(open_joint(tiny_run.data), base, base, "the recipe nano"))
    assert [line.split()[0] for line in few[1:4]] == ["pond", "desk", "meadow"]
    assert few[-1] == "configuration: the recipe nano, unchanged"


def outcome(**changes: object) -> Outcome:
    values = {"step": 1200, "interrupted": False, "metrics": {}, "best": 31.25, "best_step": 1000}
    return Outcome(**values | changes)  # type: ignore[arg-type]


def ended(run: Path, tiny_run: TinyRun, data: list[str], **changes: object) -> list[str]:
    console = Console(file=StringIO(), width=300)
    recipe = load_recipe("nano", tiny_run.recipe)
    tell_end(outcome(**changes), RunDirectory(run), recipe, data, open_joint(data).sources, console)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text.splitlines()


def test_the_end_names_what_is_there(tiny_run: TinyRun) -> None:
    lines = ended(tiny_run.folder, tiny_run, tiny_run.data)
    assert lines[0] == f"Done: 1,200 steps, best AP 31.2 on val, of step 1,000. Everything is in {tiny_run.folder}:"
    assert [line.split()[0] for line in lines[1 : lines.index("Next:")]] == ["best", "last", "metrics.jsonl", "log.txt"]
    assert lines[-1] == f"  metr detect {tiny_run.folder} IMAGE"
    stalled = ended(tiny_run.folder, tiny_run, tiny_run.data, stalled=True)
    assert stalled[0].startswith("Done: 1,200 steps (stopped early), best")
    assert ended(tiny_run.folder, tiny_run, tiny_run.data, interrupted=True) == [
        f"To go on:  metr train --resume -o {tiny_run.folder}"
    ]


@pytest.mark.parametrize("tested", [0, 1])
def test_the_next_command_measures_on_test_where_there_is_one(tiny_run: TinyRun, tmp_path: Path, tested: int) -> None:
    plain, other = tiny_run.data[:2]
    file = tmp_path / "my data.yaml"
    splits = "{train: train, val: val, test: val}" if tested else "{train: train, val: val}"
    file.write_text(f"datasets:\n  - {{name: tested, path: {other}, splits: {splits}}}\n", encoding="utf-8")
    lines = ended(tiny_run.folder, tiny_run, [plain, str(file)])
    expected = f"'{file}' --split test" if tested else f"{plain} '{file}'"
    assert lines[-2] == f"  metr evaluate {tiny_run.folder} {expected}"
