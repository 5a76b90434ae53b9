"""The header of a run fits on a screen; the end says what is best, where everything is, and what to do next."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from metr.data.joint import open_joint
from metr.run_directory import RunDirectory
from metr.training.config import load_recipe
from metr.training.parts import Outcome
from metr.training.plan import RunPlan, advice, header, page, steps_of, tell_end
from metr.training.resumption import Made
from metr.training.run_log import tell

from tiny import TinyRun


def shown(*parts: object, width: int = 200) -> list[str]:
    console = Console(file=StringIO(), width=width)
    console.print(*parts)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text.splitlines()


def planned(tiny_run: TinyRun, overrides: list[str], **made: int) -> RunPlan:
    """Nano's recipe with changes on the tiny datasets, twelve images."""
    recipe, base = load_recipe("nano", None, overrides), load_recipe("nano")
    joint = open_joint(tiny_run.data)
    return RunPlan(joint=joint, recipe=recipe, base=base, name="the recipe nano", made=Made(**made))


def on_a_terminal(width: int, *parts: RenderableType) -> list[str]:
    console = Console(file=StringIO(), width=width, force_terminal=True, no_color=True, color_system=None)
    for part in parts:
        tell(console, part)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text.splitlines()


@pytest.mark.parametrize("width", [80, 60])
def test_lines_are_wrapped_between_words_with_a_hanging_indent(tiny_run: TinyRun, width: int) -> None:
    path = "/home/somebody/a long folder/" + "deep/" * 20 + "model"
    plan = planned(tiny_run, ["train.loop.steps=9", f"text.source={path}", "loader.batch_size=1"])
    for renderable in (header(plan), page(plan), *advice(plan, from_nothing=True)):
        lines = on_a_terminal(width, renderable)
        assert all(len(line) <= width or any(len(word) > width - 6 for word in line.split()) for line in lines)
        assert any(line.startswith("  ") and line.strip() for line in lines), "what follows is indented"
    heads = on_a_terminal(width, header(plan))[0].split()
    assert heads[0] == "dataset"
    assert "train images evaluated on" in " ".join(heads), "no head is cut"
    told = " ".join(" ".join(on_a_terminal(width, header(plan))).split())
    for words in ("unannotated: negative", "9 images in all", f"{path}", "180 queries; text:", "evaluated at the end"):
        assert words in told, "no word is broken, and no path"


def test_a_piped_line_stays_whole(tiny_run: TinyRun) -> None:
    plan = planned(tiny_run, [])
    lines = shown(header(plan), width=10_000)
    assert any(line.startswith("device: ") and line.endswith("320 x 320 pixels (stretch)") for line in lines)


def test_intervals_longer_than_the_run_are_not_told(tiny_run: TinyRun) -> None:
    lines = shown(header(planned(tiny_run, ["train.loop.steps=8"])))
    text = "\n".join(lines)
    assert "steps: 8 of 8 images, 64 images in all, 5.3 epochs; evaluated at the end\n" in text
    assert "checkpoints at evaluations and at the end\n" in text
    one = "\n".join(shown(header(planned(tiny_run, ["train.loop.steps=1", "loader.batch_size=1"]))))
    assert "steps: 1 of 1 image, 1 image in all, 0.1 epochs;" in one
    long = "\n".join(shown(header(planned(tiny_run, []))))
    assert "evaluated every 1,000 steps and at the end\n" in long
    assert "weights averaged over about 2,000 steps; checkpoints every 500 steps\n" in long


def test_a_resumed_run_counts_the_images_that_it_has_seen(tiny_run: TinyRun) -> None:
    plan = planned(tiny_run, ["train.loop.steps=12", "loader.batch_size=6"], steps=6, images=12)
    assert plan.images == 12 + 6 * 6
    text = "\n".join(shown(header(plan)))
    assert "steps: 6 made, 6 to go of 6 images, 48 images in all, 4 epochs; " in text
    assert "  loader.batch_size: 8 -> 6\n" in text
    assert steps_of(3.0, 12, plan.recipe, plan.made) == ["train.loop.steps=10"]
    assert steps_of(1.0, 12, plan.recipe, plan.made) == ["train.loop.steps=6"]
    assert steps_of(0.5, 12, plan.recipe, plan.made) == ["train.loop.steps=5"], "less than is done, which is refused"


def test_extreme_epochs_and_few_images_are_told(tiny_run: TinyRun) -> None:
    plan = planned(tiny_run, [])
    first, second = (" ".join(shown(one)) for one in advice(plan, from_nothing=True))
    assert first.startswith("advice: 6,667 epochs are far more than images need")
    assert first.endswith("--epochs 300")
    assert second.startswith(
        "advice: 12 training images are few to train a detector from the start; metr finetune DATA"
    )
    assert second.endswith("checkpoints/metr-nano")
    assert len(advice(plan, from_nothing=False)) == 1
    assert not advice(planned(tiny_run, ["train.loop.steps=30"]), from_nothing=False)


def test_the_header_is_short_whatever_differs(tiny_run: TinyRun) -> None:
    data = [f"{letter}={tiny_run.data[0]}" for letter in "abcdefgh"]
    joint, base = open_joint(data), load_recipe("nano")
    tiny = load_recipe("nano", tiny_run.recipe)
    lines = shown(header(RunPlan(joint=joint, recipe=tiny, base=base, name="the recipe nano")))
    assert len(lines) <= 14
    assert lines[0].startswith("dataset ")
    assert [line.split()[0] for line in lines[1:5]] == ["a", "b", "c", "and"]
    assert lines[4].startswith("and 5 more ")
    assert "20 " in lines[4], "training images of the five"
    assert lines[-1].startswith("  and ")
    assert lines[-1].endswith(" more in config.yaml")
    few = shown(header(planned(tiny_run, [])))
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
    assert lines[-2:] == [f"  metr report {tiny_run.folder}", f"  metr detect {tiny_run.folder} IMAGE"]
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
    assert lines[-3] == f"  metr evaluate {tiny_run.folder} {expected}"


@pytest.mark.parametrize(
    ("verb", "from_nothing", "told"),
    [
        ("train", True, "metr finetune DATA --from"),
        ("train", False, "learning_rate"),
        ("finetune", False, "learning_rate"),
    ],
)
def test_the_end_says_that_nothing_was_learnt_and_what_to_try(
    tiny_run: TinyRun, verb: str, from_nothing: bool, told: str
) -> None:
    console = Console(file=StringIO(), width=300)
    data = tiny_run.data
    ends = outcome(metrics={"AP": 0.0, "AP pond": 0.04}, best=0.0)
    recipe, sources = load_recipe("nano", tiny_run.recipe), open_joint(data).sources
    tell_end(ends, RunDirectory(tiny_run.folder), recipe, data, sources, console, verb, from_nothing=from_nothing)
    said: str = console.file.getvalue()  # type: ignore[attr-defined]
    (line,) = [line for line in said.splitlines() if line.startswith("It has learnt next to nothing: AP is 0 on val.")]
    assert "train for longer (--steps, --epochs)" in line
    assert told in line
    assert ("begin with a trained detector" in line) == from_nothing
    assert "next to nothing" not in "\n".join(
        ended(tiny_run.folder, tiny_run, data, metrics={"AP": 0.1, "AP pond": 0.1})
    )
