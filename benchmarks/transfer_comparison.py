"""What the transfer benchmark found: a table, curves over the number of images, and the bars that it is held to."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kept_runs import told_range
from transfer_runs import ARMS, Arm, Profile, RunResult

TITLES: dict[Arm, str] = {"imagenet": "ImageNet backbone alone", "pretrained": "pretrained on the other datasets"}
_COLOURS: dict[Arm, str] = {"imagenet": "#9a9a9a", "pretrained": "#1f5a9e"}
# gains in mean AP that are aimed at, by share of the images; and what no dataset may lose with all of them
_AIMS = {0.1: 5.0, 1.0: 1.5}
_WORST = -1.0


@dataclass(frozen=True, kw_only=True)
class Point:
    """One dataset at one share: AP of both arms, the mean over the seeds that both have finished, and each seed's.

    `steps` are those that the runs took, by arm, each number once.
    """

    left_out: str
    share: float
    images: int
    seeds: tuple[int, ...]
    ap: dict[Arm, float]
    each: dict[Arm, tuple[float, ...]]
    steps: dict[Arm, tuple[int, ...]]

    @property
    def all_steps(self) -> tuple[int, ...]:
        """The steps of all its runs, each number once."""
        return tuple(sorted({number for several in self.steps.values() for number in several}))

    @property
    def gain(self) -> float:
        """What pretraining brings, in AP."""
        return self.ap["pretrained"] - self.ap["imagenet"]


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One aim: what it is about, the number aimed at, the number found."""

    what: str
    aim: float
    found: float
    reached: bool


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All points, and the aims that can be judged: those for whose share every left-out dataset has a point."""

    left_out: tuple[str, ...]
    points: tuple[Point, ...]

    @staticmethod
    def of(results: Sequence[RunResult], left_out: tuple[str, ...]) -> "Comparison":
        """The points for which both arms have finished a seed."""
        cells = {(one.left_out, one.share, one.seed, one.arm): one for one in results}
        points = []
        for name in left_out:
            for share in sorted({one.share for one in results}):
                seeds = sorted({one.seed for one in results if (one.left_out, one.share) == (name, share)})
                both = tuple(s for s in seeds if all((name, share, s, arm) in cells for arm in ARMS))
                if both:
                    runs = {arm: tuple(cells[name, share, seed, arm] for seed in both) for arm in ARMS}
                    points.append(_point(runs, both))
        return Comparison(left_out=left_out, points=tuple(points))

    @property
    def shares(self) -> tuple[float, ...]:
        """The shares of which every left-out dataset has a point."""
        have = [{point.share for point in self.points if point.left_out == name} for name in self.left_out]
        return tuple(sorted(set.intersection(*have))) if have else ()

    def at(self, share: float) -> tuple[Point, ...]:
        """The points of a share."""
        return tuple(point for point in self.points if point.share == share)

    def mean(self, share: float, arm: Arm) -> float:
        """The mean AP over the left-out datasets."""
        values = [point.ap[arm] for point in self.at(share)]
        return sum(values) / len(values)

    @property
    def bars(self) -> tuple[Bar, ...]:
        """The aims that can be judged by now."""
        bars = []
        for share in self.shares:
            if share in _AIMS:
                gain, aim = self.mean(share, "pretrained") - self.mean(share, "imagenet"), _AIMS[share]
                bars.append(Bar(what=f"gain in mean AP at {share:.0%}", aim=aim, found=gain, reached=gain >= aim))
        if 1.0 in self.shares:
            worst = min(point.gain for point in self.at(1.0))
            what = "least gain of a dataset at 100%"
            bars.append(Bar(what=what, aim=_WORST, found=worst, reached=worst >= _WORST))
        return tuple(bars)


def as_markdown(comparison: Comparison, profile: Profile) -> str:
    """The table, the aims, and what got worse."""
    head = ["left out", "share", "images", "steps", "seeds", *(TITLES[arm] for arm in ARMS), "gain"]
    rows = [
        [
            point.left_out,
            f"{point.share:.0%}",
            str(point.images),
            told_range(point.all_steps),
            str(len(point.seeds)),
            *(_with_spread(point, arm) for arm in ARMS),
            f"{point.gain:+.1f}",
        ]
        for point in comparison.points
    ]
    for share in comparison.shares:
        means = [comparison.mean(share, arm) for arm in ARMS]
        told = [f"**{value:.1f}**" for value in means]
        rows.append(["**mean**", f"{share:.0%}", "", "", "", *told, f"**{means[1] - means[0]:+.1f}**"])
    ruled = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in ruled)
    aims = [f"- {bar.what}: {bar.found:+.1f} (aim {bar.aim:+.1f}), {_verdict(bar)}" for bar in comparison.bars]
    parts = (_preface(comparison, profile), table, "\n".join(aims), _worse(comparison))
    return "\n\n".join(part for part in parts if part) + "\n"


def draw_curves(comparison: Comparison, path: Path) -> None:
    """AP over the number of training images, a panel for each dataset and one for their mean."""
    names = [name for name in comparison.left_out if any(point.left_out == name for point in comparison.points)]
    panels = [*names, *(["mean"] if len(names) > 1 and comparison.shares else [])]
    figure = Figure(figsize=(3.4 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for arm in ARMS:
            shares, values = _curve(comparison, name, arm)
            axes.plot(shares, values, marker="o", markersize=4, color=_COLOURS[arm], label=TITLES[arm])
            for point in comparison.points:
                if point.left_out == name:
                    each = point.each[arm]
                    axes.plot([point.share] * len(each), each, "_", color=_COLOURS[arm], alpha=0.6)
        axes.set_title(name)
        axes.set_xscale("log")
        ticks = sorted({point.share for point in comparison.points})
        axes.set_xticks(ticks, [f"{share:.0%}" for share in ticks])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("AP")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


def _point(runs: dict[Arm, tuple[RunResult, ...]], seeds: tuple[int, ...]) -> Point:
    """A point by the runs of both arms, in the order of the seeds."""
    first, each = runs[ARMS[0]][0], {arm: tuple(one.ap for one in several) for arm, several in runs.items()}
    return Point(
        left_out=first.left_out,
        share=first.share,
        images=first.images,
        seeds=seeds,
        ap={arm: sum(values) / len(values) for arm, values in each.items()},
        each=each,
        steps={arm: tuple(sorted({one.steps for one in several})) for arm, several in runs.items()},
    )


def _preface(comparison: Comparison, profile: Profile) -> str:
    """What the numbers are, and how alike the arms were treated."""
    without = "all of them at once" if profile.shared else "one at a time"
    uneven = [
        f"{point.left_out} at {point.share:.0%} "
        f"({', '.join(f'{TITLES[arm]} {told_range(point.steps[arm])}' for arm in ARMS)})"
        for point in comparison.points
        if len(point.all_steps) > 1
    ]
    alike = f"**not for the same steps: {'; '.join(uneven)}**" if uneven else "for the same steps"
    return (
        f"AP (0 to 100) on the val split of the left-out dataset, own names, last weights; left out: {without}. "
        f"Both arms see the same images in the same order, {alike}. In brackets: the range of the seeds."
    )


def _worse(comparison: Comparison) -> str:
    """Where pretraining loses."""
    worse = [
        f"{point.left_out} at {point.share:.0%} ({point.gain:+.1f})" for point in comparison.points if point.gain < 0
    ]
    return f"Worse with pretraining: {', '.join(worse) or 'nothing'}."


def _curve(comparison: Comparison, name: str, arm: Arm) -> tuple[list[float], list[float]]:
    if name == "mean":
        return list(comparison.shares), [comparison.mean(share, arm) for share in comparison.shares]
    points = [point for point in comparison.points if point.left_out == name]
    return [point.share for point in points], [point.ap[arm] for point in points]


def _with_spread(point: Point, arm: Arm) -> str:
    each = point.each[arm]
    spread = f" ({min(each):.1f} to {max(each):.1f})" if len(each) > 1 else ""
    return f"{point.ap[arm]:.1f}{spread}"


def _verdict(bar: Bar) -> str:
    return "reached" if bar.reached else "**not reached**"
