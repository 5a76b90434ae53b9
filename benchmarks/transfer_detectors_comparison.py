"""What the benchmark of detectors found: a table, a bar chart, and the bars that it is held to."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kept_runs import told_range
from metr.conversion.targets import find_target
from transfer_comparison import Bar
from transfer_detectors_runs import Pretraining, Profile, RunResult
from transfer_detectors_starts import ARMS, BACKBONE_ALONE, Arm

TITLES: dict[Arm, str] = {
    "own": "ImageNet backbone, transformers' start",
    "untrained": "ImageNet backbone, METR's start",
    "joint": "own pretraining, concatenated labels",
    "metr": "METR's weights",
}
_COLOURS: dict[Arm, str] = {"own": "#c4c4c4", "untrained": "#8a8a8a", "joint": "#e08a2e", "metr": "#1f5a9e"}
# the gain in mean AP that is aimed at; besides, each detector is to gain
_AIM = 3.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One detector: AP of each arm, the mean over the seeds that all arms have finished, and each seed's.

    `steps` are those that the runs took, by arm, each number once.
    """

    detector: str
    images: int
    seeds: tuple[int, ...]
    ap: dict[Arm, float]
    each: dict[Arm, tuple[float, ...]]
    before: float | None
    steps: dict[Arm, tuple[int, ...]]

    @property
    def all_steps(self) -> tuple[int, ...]:
        """The steps of all its runs, each number once."""
        return tuple(sorted({number for several in self.steps.values() for number in several}))

    @property
    def backbone(self) -> float:
        """AP from the backbone alone: of the better of its two starts."""
        return max(self.ap[arm] for arm in BACKBONE_ALONE)

    @property
    def gain(self) -> float:
        """What METR's weights bring over the backbone alone, in AP."""
        return self.ap["metr"] - self.backbone

    @property
    def over_joint(self) -> float:
        """What they bring over the detector's own pretraining, in AP."""
        return self.ap["metr"] - self.ap["joint"]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All detectors of which every arm is finished, and the aims, once all of them are."""

    detectors: tuple[str, ...]
    rows: tuple[Row, ...]

    @staticmethod
    def of(results: Sequence[RunResult], detectors: Sequence[str]) -> "Comparison":
        """The detectors for which all arms have finished a seed."""
        cells = {(one.detector, one.seed, one.arm): one for one in results}
        rows = []
        for name in detectors:
            seeds = sorted({one.seed for one in results if one.detector == name})
            whole = tuple(seed for seed in seeds if all((name, seed, arm) in cells for arm in ARMS))
            if not whole:
                continue
            runs = {arm: tuple(cells[name, seed, arm] for seed in whole) for arm in ARMS}
            rows.append(_row(runs, whole))
        return Comparison(detectors=tuple(detectors), rows=tuple(rows))

    @property
    def gain(self) -> float:
        """The mean over the detectors of what METR's weights bring."""
        return sum(row.gain for row in self.rows) / len(self.rows)

    @property
    def bars(self) -> tuple[Bar, ...]:
        """The aims; none before every detector is finished."""
        if len(self.rows) < len(self.detectors):
            return ()
        each = [
            Bar(what=f"gain of {find_target(row.detector).title}", aim=0.0, found=row.gain, reached=row.gain > 0)
            for row in self.rows
        ]
        return (*each, Bar(what="mean gain", aim=_AIM, found=self.gain, reached=self.gain >= _AIM))


def as_markdown(comparison: Comparison, profile: Profile, pretraining: Sequence[Pretraining]) -> str:
    """The table, the aims, and what got worse."""
    gains = ["gain over the better backbone", "gain over own pretraining"]
    head = ["detector", *(TITLES[arm] for arm in ARMS), *gains, "METR's weights before any step"]
    lines = [
        [
            find_target(row.detector).title,
            *(_with_spread(row, arm) for arm in ARMS),
            f"{row.gain:+.1f}",
            f"{row.over_joint:+.1f}",
            "-" if row.before is None else f"{row.before:.1f}",
        ]
        for row in comparison.rows
    ]
    if len(comparison.rows) > 1:
        lines.append(_mean_line(comparison))
    ruled = [head, ["---"] + ["---:"] * (len(head) - 1), *lines]
    table = "\n".join("| " + " | ".join(line) + " |" for line in ruled)
    aims = [f"- {bar.what}: {bar.found:+.1f} ({_aim(bar)}), {_verdict(bar)}" for bar in comparison.bars]
    parts = (
        _preface(comparison, profile, pretraining),
        table,
        "\n".join(aims),
        _worse(comparison),
        _times(pretraining),
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def draw_bars(comparison: Comparison, path: Path) -> None:
    """AP of each arm, a group of bars for each detector and one for their mean."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes, width = figure.subplots(), 0.84 / len(ARMS)
    several = len(comparison.rows) > 1
    for number, arm in enumerate(ARMS):
        heights = [row.ap[arm] for row in comparison.rows] + ([_mean(comparison, arm)] if several else [])
        places = [place + (number - (len(ARMS) - 1) / 2) * width for place in range(len(heights))]
        bars = axes.bar(places, heights, width * 0.94, color=_COLOURS[arm], label=TITLES[arm])
        axes.bar_label(bars, [f"{height:.1f}" for height in heights], fontsize=8, padding=1)
    names = [find_target(row.detector).title for row in comparison.rows] + (["mean"] if several else [])
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("AP")
    axes.set_ylim(bottom=0)
    axes.margins(y=0.14)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


def _row(runs: dict[Arm, tuple[RunResult, ...]], seeds: tuple[int, ...]) -> Row:
    """A detector by the runs of all arms, in the order of the seeds."""
    each = {arm: tuple(one.ap for one in several) for arm, several in runs.items()}
    first = runs["metr"][0]
    return Row(
        detector=first.detector,
        images=first.images,
        seeds=seeds,
        ap={arm: sum(values) / len(values) for arm, values in each.items()},
        each=each,
        before=first.ap_before,
        steps={arm: tuple(sorted({one.steps for one in several})) for arm, several in runs.items()},
    )


def _preface(comparison: Comparison, profile: Profile, pretraining: Sequence[Pretraining]) -> str:
    """What the numbers are, and how alike the arms were treated."""
    images = told_range(row.images for row in comparison.rows)
    each = {find_target(row.detector).title: told_range(row.all_steps) for row in comparison.rows}
    told = (
        [f"{steps} ({title})" for title, steps in each.items()] if len({*each.values()}) > 1 else [*each.values()][:1]
    )
    uneven = [
        f"{find_target(row.detector).title} ({', '.join(f'{arm} {told_range(row.steps[arm])}' for arm in ARMS)})"
        for row in comparison.rows
        if len(row.all_steps) > 1
    ]
    alike = f"but **not for the same steps: {'; '.join(uneven)}**" if uneven else "is trained alike"
    return (
        f"AP (0 to 100) on the val split of {profile.left_out}, after {' or '.join(told)} steps of transformers' "
        f"Trainer on its {images} training images, last weights; every arm of a detector has the same sizes, sees "
        f"the same images in the same order, {'' if uneven else 'and '}{alike}. METR and the detectors themselves "
        f"were pretrained on {_drawn(pretraining)}. In brackets: the range of the seeds."
    )


def _drawn(pretraining: Sequence[Pretraining]) -> str:
    """On how many images everything was pretrained, as far as the runs tell."""
    drawn: dict[str, set[int]] = {}
    for one in pretraining:
        if one.images is not None:
            drawn.setdefault(one.detector, set()).add(one.images)
    if not drawn:
        return "images drawn from the other datasets"
    numbers = [f"{find_target(name).title} {told_range(several)}" for name, several in drawn.items()]
    all_numbers = set().union(*drawn.values())
    told = told_range(all_numbers) if len(all_numbers) == 1 else " or ".join(numbers)
    uneven = any(len(several) > 1 for several in drawn.values())
    same = "**not the same number for METR and the detector itself**" if uneven else "the same ones"
    return f"{told} images drawn from the other datasets, {same}"


def _mean_line(comparison: Comparison) -> list[str]:
    over_joint = sum(row.over_joint for row in comparison.rows) / len(comparison.rows)
    values = [*(f"{_mean(comparison, arm):.1f}" for arm in ARMS), f"{comparison.gain:+.1f}", f"{over_joint:+.1f}"]
    return ["**mean**", *(f"**{value}**" for value in values), ""]


def _worse(comparison: Comparison) -> str:
    """Where METR's weights are behind another start."""
    behind = [
        f"{find_target(row.detector).title} behind {TITLES[arm]} ({row.ap['metr'] - row.ap[arm]:+.1f})"
        for row in comparison.rows
        for arm in ARMS
        if row.ap["metr"] < row.ap[arm]
    ]
    return f"Worse with METR's weights: {', '.join(behind) or 'nothing'}."


def _times(pretraining: Sequence[Pretraining]) -> str:
    """How long pretraining took, for detectors of which both are finished."""
    seconds: dict[str, list[float]] = {}
    for one in pretraining:
        seconds.setdefault(one.detector, []).append(one.training_seconds)
    told = [
        f"{find_target(name).title} {' and '.join(f'{one / 60:.1f}' for one in both)}"
        for name, both in seconds.items()
        if len(both) > 1
    ]
    return f"Minutes of pretraining, METR's and the detector's own: {', '.join(told)}." if told else ""


def _mean(comparison: Comparison, arm: Arm) -> float:
    return sum(row.ap[arm] for row in comparison.rows) / len(comparison.rows)


def _with_spread(row: Row, arm: Arm) -> str:
    each = row.each[arm]
    spread = f" ({min(each):.1f} to {max(each):.1f})" if len(each) > 1 else ""
    return f"{row.ap[arm]:.1f}{spread}"


def _aim(bar: Bar) -> str:
    return f"aim {bar.aim:+.1f}" if bar.aim else "aim: above 0"


def _verdict(bar: Bar) -> str:
    return "reached" if bar.reached else "**not reached**"
