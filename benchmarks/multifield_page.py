"""What the page of MultiField says: AP of every arm, names that mean the same, goals, and the arms in words."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import report
from metr.config import Tree, read_yaml
from metr.evaluation.report import as_markdown
from metr.evaluation.results import EvaluationReport, from_dict
from metr.report import write_evaluation_page

TITLES = {
    "separate": "a METR for each",
    "closed_set": "closed head, concatenated labels",
    "ignore": "joint METR, unannotated ignored",
    "negative": "joint METR, unannotated negative",
    "pseudo_label": "joint METR, unannotated pseudo-labelled",
}
ARMS = tuple(TITLES)
JOINT = ARMS[2:]
MODES = {"own": "own names", "joint": "all names"}
RECALL_AT = 10
WIDE = 8
"""The most datasets that a table has as columns; of more, they are its rows."""
AHEAD = {"closed_set": 2.0, "separate": 5.0}
"""How far ahead in mean AP the best joint arm is to be: of the closed head (all names), of separate METRs (own)."""
CONFUSION = 2.0
"""The most, in %, of the best detections that are to name another field."""


def best_joint(result: Mapping[str, Any]) -> str | None:
    """Of the joint arms the one with the highest mean AP, all names asked for."""
    joint = [arm for arm in JOINT if arm in result["arms"]]
    return max(joint, key=lambda arm: mean_ap(result["arms"][arm], "joint") or 0.0, default=None)


def write_arms(result: Mapping[str, Any], path: Path) -> Path:
    """The page of the best joint arm, with the other arms beside it; each separate METR is an arm of its own."""
    reports = {arm: from_dict(one["report"]) for arm, one in result["arms"].items()}
    names = tuple(all_datasets(result["arms"]))
    alone = reports.pop("separate", EvaluationReport(datasets=(), names=0))
    reports = {arm: replace(one, trained_on=names) for arm, one in reports.items()}
    best = best_joint(result) or next(iter(reports))
    arms = {f"{one.name} alone": replace(alone, datasets=(one,), trained_on=(one.name,)) for one in alone.datasets}
    arms |= {TITLES[arm]: one for arm, one in reports.items() if arm != best}
    return write_evaluation_page(reports[best], path, f"MultiField, {result['profile']}: {TITLES[best]}", arms)


def mean_ap(arm: Mapping[str, Any], mode: str) -> float | None:
    """The mean AP of an arm, asked for own names or for all; None where it was not evaluated so."""
    values: Mapping[str, float] = arm["report"]["mean"].get(mode, {})
    return values.get("ap")


def ap_by_dataset(arm: Mapping[str, Any], mode: str) -> dict[str, float | None]:
    """The AP of an arm on each dataset."""
    return {one["name"]: (one[mode] or {"coco": {}})["coco"].get("ap") for one in arm["report"]["datasets"]}


def all_datasets(arms: Mapping[str, Any]) -> list[str]:
    """The names of all datasets; an arm may have been evaluated on some of them."""
    return max(([one["name"] for one in arm["report"]["datasets"]] for arm in arms.values()), key=len)


def common_means(arms: Mapping[str, Any], mode: str) -> tuple[int, dict[str, float | None]]:
    """How many datasets all these arms were evaluated on, and the mean AP of each arm over those that count."""
    several = [{one["name"] for one in arm["report"]["datasets"] if one["in_mean"]} for arm in arms.values()]
    common = set.intersection(*several)
    return len(common), {
        arm: report.mean(ap for name, ap in ap_by_dataset(one, mode).items() if name in common)
        for arm, one in arms.items()
    }


def page(result: Mapping[str, Any]) -> str:
    """The page of a result: METR's own evaluation, or the arms side by side."""
    if "report" in result:
        return report.joined(as_markdown(from_dict(result["report"])), training_facts(result))
    arms = result["arms"]
    unified = {arm: one for arm, one in arms.items() if mean_ap(one, "joint") is not None}
    return report.joined(
        f"# MultiField: {result['profile']}",
        f"{report.profile_of(result)}, seed {result['seed']}, {report.facts(result)}.",
        "AP, each dataset's own names:",
        ap_table(arms, "own"),
        "AP, all names at once:" if unified else "",
        ap_table(unified, "joint") if unified else "",
        confusion_table(unified) if unified else "",
        *verdicts(result),
        goals_list(result["goals"]) if "goals" in result else "",
        same_meaning_table(result),
    )


def training_facts(result: Mapping[str, Any]) -> str:
    """What a training took, in one sentence."""
    return (
        f"{report.profile_of(result)}: {result['images_seen']:,} images seen in {result['steps']:,} steps, "
        f"{result['training_seconds'] / 60:.0f} minutes of training steps on {report.facts(result)}, "
        f"seed {result['seed']}."
    )


def ap_table(arms: Mapping[str, Any], mode: str) -> str:
    """AP of every arm on every dataset; of an arm that saw some datasets, the mean is of those alone."""
    names = all_datasets(arms)
    partial = any(len(one["report"]["datasets"]) < len(names) for one in arms.values())
    common, means = common_means(arms, mode) if partial else (0, {})
    head, rows = ["", *names, "mean", *([f"mean of {common}"] if partial else []), "images seen", "minutes"], []
    for arm, one in arms.items():
        found = ap_by_dataset(one, mode)
        whole = mean_ap(one, mode) if len(found) == len(names) else None
        values = [*map(found.get, names), whole, *([means[arm]] if partial else [])]
        cost = [f"{one['images_seen']:,}", f"{one['training_seconds'] / 60:.0f}"]
        rows.append([TITLES[arm], *map(report.number, values), *cost])
    if len(names) > WIDE:
        head, *rows = map(list, zip(head, *rows, strict=True))
    return report.table(head, rows)


def confusion_table(arms: Mapping[str, Any]) -> str:
    """What category extraction and the fields say of every arm that was asked for all names."""
    rows, names = [], all_datasets(arms)
    for arm, one in arms.items():
        datasets, confusion = one["report"]["datasets"], one["report"]["confusion"]
        recalls = [each["joint"]["recall"].get(str(RECALL_AT)) for each in datasets]
        told = ", ".join(map(report.number, recalls if len(names) <= WIDE else [report.mean(recalls)]))
        shares = [share for share in (confusion or {}).get("shares", {}).values() if share is not None]
        mean = report.number(sum(shares) / len(shares) if shares else None)
        rows.append([TITLES[arm], "-" if arm == "closed_set" else told, mean])
    what = ", ".join(names) if len(names) <= WIDE else "mean"
    return report.table(["", f"recall at {RECALL_AT}: {what}", "cross-dataset confusion, %"], rows)


def verdicts(result: Mapping[str, Any]) -> list[str]:
    """The best joint arm against the others, in words."""
    best, arms = best_joint(result), result["arms"]
    if best is None:
        return []
    own, unified = (mean_ap(arms[best], mode) or 0.0 for mode in ("own", "joint"))
    lines = [f"Best joint arm: {TITLES[best]}; all names / own names: {unified / own if own else 0:.2f}."]
    if "separate" in arms:
        alone, together = (ap_by_dataset(arms[arm], "own") for arm in ("separate", best))
        inside = [one["name"] for one in arms["separate"]["report"]["datasets"] if one["in_mean"]]
        worst = min((together[name] or 0.0) - (alone[name] or 0.0) for name in inside)
        lines.append(
            f"Against a METR for each, own names: {ahead(arms, best, 'separate', 'own'):+.1f} in the mean, "
            f"{worst:+.1f} at worst."
        )
    if "closed_set" in arms:
        gained, with_own = (ahead(arms, best, "closed_set", mode) for mode in ("joint", "own"))
        also = f", {with_own:+.1f} with own names" if "goals" in result else ""
        lines.append(f"Against the closed head, all names: {gained:+.1f} in the mean{also}.")
    return lines


def ahead(arms: Mapping[str, Any], best: str, other: str, mode: str) -> float:
    """How far an arm is ahead of another in mean AP, over the datasets that both were evaluated on."""
    _, means = common_means({arm: arms[arm] for arm in (best, other)}, mode)
    return (means[best] or 0.0) - (means[other] or 0.0)


def goals(result: Mapping[str, Any]) -> Tree:
    """What the best joint arm is to reach: `aims` against those other arms that are there, and `confusion`."""
    best, arms = best_joint(result), result["arms"]
    if best is None:
        return {"aims": [], "confusion": None}
    aims = [
        report.aim(f"ahead of {TITLES[arm]}, {names}", AHEAD[arm], ahead(arms, best, arm, mode))
        for arm, mode, names in (("closed_set", "joint", "all names"), ("separate", "own", "own names"))
        if arm in arms
    ]
    confusion = arms[best]["report"]["mean"].get("confusion")
    return {"aims": aims, "confusion": None if confusion is None else report.bar(confusion, CONFUSION)}


def goals_list(found: Mapping[str, Any]) -> str:
    """The goals as a list in Markdown."""
    lines, confusion = [report.aims_list(found["aims"])], found["confusion"]
    if confusion is not None:
        lines.append(f"- cross-dataset confusion: {confusion['value']:.1f} % ({report.bar_text(confusion)})")
    return "\n".join(line for line in lines if line)


def same_meaning(datasets: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Names that mean the same (same_meaning.yaml), where all their datasets are among these."""
    groups: dict[str, dict[str, list[str]]] = read_yaml(Path(__file__).with_name("same_meaning.yaml"))
    return {title: group for title, group in groups.items() if group.keys() <= set(datasets)}


def ap_by_label(arm: Mapping[str, Any], mode: str) -> dict[tuple[str, str], float]:
    """The AP of each (dataset, name) that has objects in the val split."""
    return {
        (one["name"], category["name"]): category["ap"]
        for one in arm["report"]["datasets"]
        for category in one[mode]["coco"]["categories"]
        if category["ap"] is not None
    }


def same_meaning_table(result: Mapping[str, Any]) -> str:
    """Both heads on names that mean the same, and on the other names of the datasets that count in the mean."""
    arms, best = result["arms"], best_joint(result)
    if best is None or "closed_set" not in arms or not result.get("same_meaning"):
        return ""
    columns = {(mode, arm): ap_by_label(arms[arm], mode) for mode in MODES for arm in ("closed_set", best)}
    groups = {
        title: [(dataset, name) for dataset, names in group.items() for name in names]
        for title, group in result["same_meaning"].items()
    }
    every = list(dict.fromkeys(label for labels in groups.values() for label in labels))
    counted = {one["name"] for one in arms[best]["report"]["datasets"] if one["in_mean"]}
    others = [label for label in columns["own", best] if label not in every and label[0] in counted]
    rows = []
    for title, labels in {**groups, "**all of these**": every, "**all other names**": others}.items():
        found = {column: report.mean(map(aps.get, labels)) for column, aps in columns.items()}
        gains = [_difference(found[mode, best], found[mode, "closed_set"]) for mode in MODES]
        scored = sum(label in columns["own", best] for label in labels)
        values = [*map(report.number, found.values()), *(report.number(gain, "+.1f") for gain in gains)]
        rows.append([title, _spelt(result["same_meaning"].get(title, {})), str(scored), *values])
    heads = [f"{arm}, {title}" for title in MODES.values() for arm in ("closed head", "METR")]
    table = report.table(["", "names", "scored", *heads, *(f"gain, {it}" for it in MODES.values())], rows, left=2)
    return report.joined("Mean AP of names that mean the same; scored are those with objects in a val split:", table)


def _spelt(group: Mapping[str, Sequence[str]]) -> str:
    """A group of names in few words, such as `coco_mini: bottle; taco_litter: Bottle`."""
    return "; ".join(f"{dataset}: {', '.join(names)}" for dataset, names in group.items())


def _difference(one: float | None, two: float | None) -> float | None:
    return None if one is None or two is None else one - two


def bars(arms: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """AP with own and with all names: a group for each dataset and one for their mean."""
    panels: dict[str, dict[str, dict[str, float]]] = {}
    names = all_datasets(arms)
    for mode, title in MODES.items():
        label = f"AP, {title}"
        for arm, one in arms.items():
            found = ap_by_dataset(one, mode)
            whole = mean_ap(one, mode) if len(found) == len(names) else None
            for name, ap in {**dict.fromkeys(names), **found, "mean": whole}.items():
                panels.setdefault(label, {}).setdefault(name, {}).update({} if ap is None else {arm: ap})
    return panels
