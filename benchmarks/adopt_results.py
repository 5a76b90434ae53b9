"""The fine-tunings that `adopt.py` compares; its goals, page and chart, from the reports of its runs alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import report
from metr.config import Tree

TITLES = {
    "imagenet": "METR, ImageNet backbone",
    "transformers": "the source, transformers' Trainer",
    "adopted": "METR, adopted",
}
ARMS = tuple(TITLES)
ALIKE = 0.2
"""AP by which METR may differ from its source before any step."""
OVER_IMAGENET, UNDER_SOURCE = 5.0, -1.5
"""What METR is to gain over the ImageNet backbone in mean AP, and how far it may be from the source."""
KEPT = 90.0
"""Per cent of the old AP that is to remain after fine-tuning with rehearsal."""


def cells(new: Sequence[str], seeds: Mapping[float, Sequence[int]], arms: Sequence[str], detector: str) -> list[Tree]:
    """The fine-tunings of some arms, the smallest fractions first."""
    return [
        {"detector": detector, "new": dataset, "share": share, "seed": seed, "arm": arm}
        for dataset in new
        for share in sorted(seeds)
        for seed in seeds[share]
        for arm in arms
    ]


def run_title(cell: Mapping[str, Any]) -> str:
    """A fine-tuning in a few words."""
    return f"{cell['detector']}, {cell['new']}, {cell['share']:.0%}, seed {cell['seed']}, {cell['arm']}"


def source_result(detector: str, reports: Mapping[str, Tree], tuned: Sequence[Tree], least: float, cells: int) -> Tree:
    """What is known of one source.

    Args:
        detector: Its name.
        reports: Of `trained`, `adopted` and `rehearsed`, as far as they are finished.
        tuned: The reports of its fine-tunings, and of those from the ImageNet backbone.
        least: The mean AP under which it is not fine-tuned.
        cells: How many datasets and fractions are compared when all is done.
    """
    before = reports.get("adopted", {}).get("datasets", {})
    mean = report.mean(one["source"] for one in before.values())
    points = report.compare_arms(tuned, ("new", "share"), ARMS)
    result = {
        "detector": detector,
        "training_seconds": reports["trained"]["training_seconds"],
        "steps": reports["trained"]["steps"],
        "images_seen": reports["trained"]["images_seen"],
        "before": before,
        "notes": reports.get("adopted", {}).get("notes", []),
        "mean_ap": mean,
        "least_ap": least,
        "compared": not before or (mean or 0.0) >= least,
        "points": points,
        "rehearsed": reports.get("rehearsed"),
    }
    return result | {"bars": goals(result, cells)}


def goals(source: Mapping[str, Any], cells: int) -> list[Tree]:
    """The goals that can be judged by now."""
    found, title, points = [], source["detector"], source["points"]
    if source["before"]:
        apart = {mode: differences(source["before"], mode) for mode in ("own", "joint")}
        own = min(apart["own"], default=0.0)
        every = -max((abs(value) for value in apart["joint"]), default=0.0)
        found.append(report.aim(f"{title}: least of AP before any step, own names, over the source's", -ALIKE, own))
        found.append(
            report.aim(f"{title}: most distant AP before any step, all names, from the source's", -ALIKE, every)
        )
    if points and len(points) == cells:
        over, under = mean_over(points, "imagenet"), mean_over(points, "transformers")
        found.append(report.aim(f"{title}: mean AP over the ImageNet backbone", OVER_IMAGENET, over))
        found.append(report.aim(f"{title}: mean AP over the source itself", UNDER_SOURCE, under))
    if source["rehearsed"] and (kept := kept_of(source)) is not None:
        found.append(report.aim(f"{title}: per cent of the old AP after rehearsal", KEPT, kept))
    return found


def differences(before: Mapping[str, Tree], mode: str) -> list[float]:
    """METR's AP less its source's, of each dataset on which both are known."""
    both = [(one[mode], one["source"]) for one in before.values()]
    return [ours - theirs for ours, theirs in both if ours is not None and theirs is not None]


def mean_over(points: Sequence[Tree], arm: str) -> float:
    """How far the adopted METR is over another arm in the mean."""
    return float(sum(one["ap"]["adopted"] - one["ap"][arm] for one in points) / len(points))


def kept_of(source: Mapping[str, Any]) -> float | None:
    """Per cent of the mean AP of the source's datasets that is left; None where there was nothing."""
    old = [one for name, one in source["rehearsed"]["datasets"].items() if name in source["before"]]
    before, after = (report.mean(one[when] for one in old) for when in ("before", "after"))
    return 100 * (after or 0.0) / before if before else None


def page(result: Mapping[str, Any]) -> str:
    """The page of a result: how it was measured, the goals, and each source's tables."""
    made = [(one["title"], one["commit"]) for one in result["commits"]]
    return report.joined(
        f"# Adopted detectors: {result['profile']}",
        f"{report.profile_of(result)}: {result['training_seconds'] / 60:.0f} minutes of training steps on "
        f"{report.facts(result)}, transformers {result['transformers']}.",
        "AP (0 to 100) on the val splits, last weights. In brackets: the range of the seeds.",
        report.aims_list(bar for one in result["sources"] for bar in one["bars"]),
        *(part for one in result["sources"] for part in source_parts(one)),
        report.runs_by_commit(made),
    )


def source_parts(source: Mapping[str, Any]) -> list[str]:
    """The paragraphs and tables of one source."""
    minutes = source["training_seconds"] / 60
    return [
        f"## {source['detector']}",
        f"Trained in {source['steps']:,} steps ({source['images_seen']:,} images, {minutes:.0f} minutes).",
        before_table(source),
        *(f"{note[0].upper()}{note[1:]}." for note in source["notes"]),
        ""
        if source["compared"]
        else f"**Not fine-tuned: its mean AP is {report.number(source['mean_ap'])}, under {source['least_ap']:g}.**",
        tuned_table(source["points"]),
        rehearsed_table(source),
    ]


def before_table(source: Mapping[str, Any]) -> str:
    """AP before any step, dataset by dataset."""
    if not source["before"]:
        return ""
    rows = [
        [name, *(report.number(one[key], ".2f") for key in ("unclipped", "source", "joint", "own"))]
        for name, one in source["before"].items()
    ]
    head = ["before any step", "the source", "boxes clipped", "METR: all names, no suppression", "METR: own names"]
    return report.table(head, rows)


def tuned_table(points: Sequence[Tree]) -> str:
    """AP after fine-tuning, a row for each dataset and fraction."""
    if not points:
        return ""
    named = {f"{point['new']} at {point['share']:.0%}": point for point in points}
    rows = [
        [
            point["new"],
            f"{point['share']:.0%}",
            str(point["images"]),
            report.steps_of(point),
            str(len(point["seeds"])),
            *(report.ap_of_seeds(point, arm) for arm in ARMS),
        ]
        for point in points
    ]
    means = [sum(point["ap"][arm] for point in points) / len(points) for arm in ARMS]
    rows.append(["**mean**", "", "", "", "", *(f"**{value:.1f}**" for value in means)])
    table = report.table(["fine-tuned on", "share", "images", "steps", "seeds", *TITLES.values()], rows)
    return f"All see the same images in the same order, {report.same_steps(named)}.\n\n{table}"


def rehearsed_table(source: Mapping[str, Any]) -> str:
    """AP before and after fine-tuning with rehearsal."""
    if not source["rehearsed"]:
        return ""
    rows = [
        [name, "old" if name in source["before"] else "new", report.number(one["before"]), report.number(one["after"])]
        for name, one in source["rehearsed"]["datasets"].items()
    ]
    return report.table(["with rehearsal, own names", "is", "before", "after"], rows, left=2)


def bars(result: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """AP of each arm: a panel for each source, a group for each dataset and fraction."""
    return {
        f"AP, {one['detector']}": {f"{point['new']}, {point['share']:.0%}": point["ap"] for point in one["points"]}
        for one in result["sources"]
        if one["points"]
    }
