"""What every study makes of its results: Markdown tables, charts, a sheet of detections, and the files.

Pages and charts are drawn from the values of the JSON file alone, so a result that exists can be shown again.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

from metr.config import Tree
from metr.data.images import read_image
from metr.data.joint import open_joint
from metr.inference.draw import contact_sheet, draw_detections, save_image
from metr.model import METR

SHOWN = 2  # images of each dataset on a sheet of detections
THRESHOLD = 0.35
COLUMNS = 4  # curves beside each other
UPRIGHT = 10  # the most groups of bars whose names stand upright
COLOURS = ("#9a9a9a", "#e08a2e", "#9dbfe3", "#5c93cf", "#1f5a9e")  # of arms; the last arm has the last one


def write_result(stem: Path, result: Mapping[str, Any], page: str | None = None) -> None:
    """Writes a result as JSON, and its page of Markdown beside it; `stem` is their path without a suffix."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if page is not None:
        stem.with_suffix(".md").write_text(page, encoding="utf-8")
    Console().print(f"{page or ''}\nwritten: {stem}.json", markup=False, soft_wrap=True)


def joined(*parts: str) -> str:
    """A page of Markdown of those parts that say something."""
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table in Markdown; the first `left` columns are words, the others numbers."""
    ruled = [head, ["---"] * left + ["---:"] * (len(head) - left), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in ruled)


def number(value: float | None, form: str = ".1f") -> str:
    """A number with one decimal; "-" where there is none. What rounds to nothing has no sign."""
    return "-" if value is None else re.sub(r"^[-+](?=[0.,]+$)", "", f"{value:{form}}")


def facts(result: Mapping[str, Any]) -> str:
    """On what, and by which commits, a result was made."""
    return f"{result['hardware']}, torch {result['torch']}, commit {result['commit']}"


def profile_of(result: Mapping[str, Any]) -> str:
    """The profile of a result, and whether all of its runs are in it."""
    return f"Profile `{result['profile']}`{'' if result.get('complete', True) else ' (not complete)'}"


def number_range(values: Iterable[float]) -> str:
    """A number, or the least and the largest of several."""
    several = sorted(set(values))
    return f"{several[0]:,}" if len(several) == 1 else f"{several[0]:,} to {several[-1]:,}"


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of those values that are there."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def compare_arms(runs: Iterable[Mapping[str, Any]], keys: Sequence[str], arms: Sequence[str]) -> list[Tree]:
    """Runs side by side: one cell for all runs that agree in `keys`, over the seeds that every arm has finished.

    A cell has its keys, `images`, `seeds` and, by arm: mean `ap`, AP of `each` seed, and `steps`, each number once.
    """
    groups: dict[tuple[Any, ...], dict[tuple[int, str], Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault(tuple(run[key] for key in keys), {})[run["seed"], run["arm"]] = run
    cells = []
    for group, found in groups.items():
        seeds = [seed for seed in sorted({seed for seed, _ in found}) if all((seed, arm) in found for arm in arms)]
        if seeds:
            each = {arm: [found[seed, arm]["ap"] for seed in seeds] for arm in arms}
            cell = dict(zip(keys, group, strict=True)) | {"images": found[seeds[0], arms[-1]]["images"], "seeds": seeds}
            ap = {arm: sum(values) / len(values) for arm, values in each.items()}
            steps = {arm: sorted({found[seed, arm]["steps"] for seed in seeds}) for arm in arms}
            cells.append(cell | {"ap": ap, "each": each, "steps": steps})
    return cells


def steps_of(cell: Mapping[str, Any]) -> str:
    """The steps that the runs of a cell took."""
    return number_range(steps for several in cell["steps"].values() for steps in several)


def same_steps(cells: Mapping[str, Mapping[str, Any]]) -> str:
    """Whether all runs of each named cell took the same steps, in words; where they did not, what each arm took."""
    uneven = [
        f"{name} ({', '.join(f'{arm} {number_range(steps)}' for arm, steps in cell['steps'].items())})"
        for name, cell in cells.items()
        if " to " in steps_of(cell)
    ]
    return f"**not for the same steps: {'; '.join(uneven)}**" if uneven else "for the same steps"


def ap_of_seeds(cell: Mapping[str, Any], arm: str) -> str:
    """AP of an arm of a cell: the mean, and the range where there are several seeds."""
    each = cell["each"][arm]
    spread = f" ({min(each):.1f} to {max(each):.1f})" if len(each) > 1 else ""
    return f"{cell['ap'][arm]:.1f}{spread}"


def aim(what: str, wanted: float, found: float, *, above: bool = False) -> Tree:
    """A goal, and whether it is reached; `above`: the number wanted is itself too little."""
    return {"what": what, "aim": wanted, "found": found, "reached": found > wanted if above else found >= wanted}


def aims_list(aims: Iterable[Mapping[str, Any]]) -> str:
    """Goals as a list in Markdown."""
    lines = []
    for one in aims:
        wanted = f"aim {one['aim']:+.1f}" if one["aim"] else "aim: above 0"
        verdict = "reached" if one["reached"] else "**not reached**"
        lines.append(f"- {one['what']}: {number(one['found'], '+.1f')} ({wanted}), {verdict}")
    return "\n".join(lines)


def bar(value: float, most: float) -> Tree:
    """A measured value, and the most that it may be."""
    return {"value": value, "bar": most, "met": value <= most}


def bar_text(one: Mapping[str, Any], unit: float = 1) -> str:
    """The most that a value may be, and whether it is."""
    return f"at most {one['bar'] / unit:g}: {'met' if one['met'] else 'missed'}"


def all_commits(runs: Iterable[Mapping[str, Any]]) -> str:
    """The commits that made some runs."""
    return " and ".join(dict.fromkeys(run["commit"] for run in runs))


def runs_by_commit(runs: Iterable[tuple[str, str]]) -> str:
    """Which commit made which run, given as (title, commit); nothing where it is the same for all."""
    titles: dict[str, list[str]] = {}
    for title, maker in runs:
        titles.setdefault(maker, []).append(title)
    if len(titles) <= 1:
        return ""
    return joined(
        "Not all runs are of one commit:", "\n".join(f"- {key}: {'; '.join(it)}" for key, it in titles.items())
    )


def draw_bars(path: Path, panels: Mapping[str, Mapping[str, Mapping[str, float]]], titles: Mapping[str, str]) -> None:
    """Writes a bar chart: a panel for each label, a group of bars for each name in it, the height of each arm's bar."""
    most = max(map(len, panels.values()))
    figure = Figure(figsize=(max(10, 0.8 * most), 1.4 + 2.6 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (label, groups) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items(), strict=True):
        width = 0.84 / len(titles)
        for number, (arm, colour) in enumerate(_colours(titles).items()):
            places = [group + (number - (len(titles) - 1) / 2) * width for group in range(len(groups))]
            bars = axes.bar(places, [it.get(arm, 0.0) for it in groups.values()], width * 0.94, color=colour)
            bars.set_label(titles[arm])
            axes.bar_label(
                bars, [f"{it[arm]:.1f}" if arm in it else "" for it in groups.values()], fontsize=7, padding=1
            )
        slanted = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if most > UPRIGHT else {}
        axes.set_xticks(range(len(groups)), list(groups), **slanted)
        axes.margins(y=0.14)
        _finish(axes, label)
    _save(figure, path)


def draw_curves(path: Path, panels: Mapping[str, Sequence[Mapping[str, Any]]], titles: Mapping[str, str]) -> None:
    """Writes curves of AP over the fraction of the images: a panel for each name, from points with `share` and `ap`."""
    columns = min(len(panels), COLUMNS)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.4 * columns, 0.6 + 3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(rows, columns, squeeze=False).flat
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    for axes, (name, points) in zip(places, panels.items(), strict=False):
        fractions = [point["share"] for point in points]
        for arm, colour in _colours(titles).items():
            axes.plot(fractions, [point["ap"][arm] for point in points], "o-", ms=4, color=colour, label=titles[arm])
            for point in points:  # every seed
                each = point.get("each", {arm: []})[arm]
                axes.plot([point["share"]] * len(each), each, "_", color=colour, alpha=0.6)
        axes.set_title(name)
        axes.set_xscale("log")
        axes.set_xticks(fractions, [f"{fraction:.0%}" for fraction in fractions])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        _finish(axes, "AP")
    _save(figure, path)


def _colours(titles: Mapping[str, str]) -> dict[str, str]:
    return dict(zip(titles, (*COLOURS[: len(titles) - 1], COLOURS[-1]), strict=True))


def _finish(axes: Axes, label: str) -> None:
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def draw_sheet(data: Sequence[str], checkpoint: Path, path: Path) -> None:
    """Writes a sheet of detections: images of every val split through one detector that is asked for all names."""
    predictor = METR.from_pretrained(checkpoint).predictor()
    images, captions = [], []
    splits = open_joint(data).evaluation()
    for name, annotations in splits.items():
        for index in evenly_spread(len(annotations), SHOWN if len(splits) <= UPRIGHT else 1):
            record = annotations[index]
            found = predictor.detect(record.path)
            images.append(draw_detections(read_image(record.path), found, THRESHOLD))
            captions.append(f"{name}: {int((found.scores >= THRESHOLD).sum())} found, {len(record.boxes)} labelled")
    save_image(contact_sheet(images, captions, columns=4, cell=400), path)


def evenly_spread(length: int, most: int) -> list[int]:
    """At most `most` places of a sequence, evenly spread: nobody chose them."""
    most = min(most, length)
    return [(2 * place + 1) * length // (2 * most) for place in range(most)]
