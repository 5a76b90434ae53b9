"""What does a detector find when it is asked by words that it was not trained with?

    python benchmarks/names.py --run checkpoints/metr-nano --data FOLDER

Every evaluation split is asked for its dataset's names, some of them called by another word (names.yaml): by a synonym,
the plural, a wider word, in German, misspelt, or written in another habit. What is found counts for the name. `kept` is
the AP that is left of the names that have such a word, in percent of what they have by their own. A word that training
called the name by (`synonyms` of a datasets file) is marked as taught.

Then the split is asked for its own names and, beside them, for words of what it never shows: related ones, unrelated
ones and nonsense. A word fires in an image if `metr detect` would show it there.

Results: `results/names.json` and `.md`. Runs: `--out`; a dataset that was measured is not measured again.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import report
import runner
from detection_defaults import Encoded, ask, encoded
from metr.checkpoint import words_of
from metr.config import Tree, read_yaml
from metr.evaluation.coco import CocoScorer
from metr.model import METR
from runner import Run, Study

WORDS = runner.HERE / "names.yaml"
KINDS = ("spelling", "synonym", "plural", "hypernym", "language", "misspelling")
ABSENT = ("related", "unrelated", "nonsense")
KEPT, FIRES = 80.0, {"related": 10.0, "unrelated": 5.0, "nonsense": 5.0}
"""Aims, in percent: what synonyms keep at least, and in how many images absent words fire at most."""
_WORST = 12


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the study; see `runner.exit_status`."""
    parser = runner.option_parser(__doc__)
    parser.add_argument("--run", required=True, help="a checkpoint or a run folder")
    parser.add_argument("--data", type=Path, required=True, help="the folder of the datasets, one folder each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/names"))
    given = vars(parser.parse_args(arguments))
    paths = {key: given.pop(key) for key in ("data", "out", "results")}
    return runner.exit_status(lambda: conduct(Study(name="names", profile="", **paths), given))


def conduct(study: Study, options: Mapping[str, Any]) -> bool:
    """Measures the datasets that are not measured yet, and writes the result."""
    torch.set_num_threads(options["threads"])
    model, words = METR.from_pretrained(options["run"], device="cpu"), read_yaml(WORDS)
    # of an adopted detector nobody knows which dataset has which name
    known, names = model.vocabulary.datasets, {*model.names}
    datasets = {
        name: own
        for name, own in words["datasets"].items()
        if name in known or (not known and own["words"].keys() <= names)
    }
    everywhere = {kind: words[kind] for kind in ABSENT[1:]}
    runs = [
        Run(
            folder=study.out / name,
            title=f"other words for names: {name}",
            settings={"run": options["run"], "words": own, **everywhere},
            work=partial(measured, model, path, {"related": own["absent"], **everywhere}, own["words"]),
        )
        for (name, own), path in zip(datasets.items(), study.datasets(list(datasets)), strict=True)
    ]
    done = runner.run_all(study, runs)
    if done:
        found = runner.reports(runs)
        facts = runner.circumstances("names", report.all_commits(found), "cpu")
        result = {**facts, "datasets": dict(zip(datasets, found, strict=True))}
        result |= {"kept": kept(found), "fires": fires(found)}
        result["bars"] = goals(result)
        report.write_result(study.results / "names", result, page(result))
    return done


def measured(
    model: METR, path: str, absent: Mapping[str, Sequence[str]], words: Mapping[str, Mapping[str, str]]
) -> Tree:
    """What is found of one dataset by its names, by other words of each kind, and of words for what is not there."""
    one, taught = encoded(model, path), words_of(model.checkpoint.training).synonyms
    own = by_name(model, one, {})
    kinds: Tree = {}
    for kind in KINDS:
        called = {name: several[kind] for name, several in words.items() if kind in several and name in one.names}
        after = by_name(model, one, called)
        kinds[kind] = [
            {"name": name, "word": word, "taught": word in taught, "own": own[name], "ap": after[name]}
            for name, word in called.items()
            if own.get(name) is not None and word not in one.names
        ]
    return {"images": len(one.annotations), "kinds": kinds, "absent": firing(model, one, absent)}


def by_name(model: METR, one: Encoded, called: Mapping[str, str]) -> dict[str, float | None]:
    """The AP of each name when some are called by other words; a word that is one of the names is left out."""
    asked = tuple(word if (word := called.get(name, name)) not in one.names else name for name in one.names)
    found = ask(model, one, asked, model.inference(names=asked))
    meant = {image: replace(each, names=one.names) for image, each in found.items()}
    scored = CocoScorer(one.annotations, [name.strip() for name in one.annotations.categories]).score(meant)
    return {each.name: each.ap for each in scored.categories}


def firing(model: METR, one: Encoded, absent: Mapping[str, Sequence[str]]) -> Tree:
    """For each absent word, in how many percent of the images `metr detect` would show it beside the own names."""
    result: Tree = {}
    for kind, words in absent.items():
        strange = [word for word in words if word not in one.names]
        asked = (*one.names, *strange)
        found = ask(model, one, asked, model.inference(names=asked)) if strange else {}
        thresholds = model.thresholds(None, asked)
        shown = dict.fromkeys(strange, 0)
        for each in map(thresholds.shown, found.values()):
            for word in {each.names[label] for label in each.labels.tolist()} & shown.keys():
                shown[word] += 1
        result[kind] = {word: 100 * number / max(len(found), 1) for word, number in shown.items()}
    return result


def kept(found: Iterable[Mapping[str, Any]]) -> Tree:
    """For each kind of word, how much AP is left: of all names, and of those whose word was, or was not, taught."""
    found = list(found)
    result: Tree = {}
    for kind in KINDS:
        rows = [row for one in found for row in one["kinds"][kind]]
        parts = {"all": rows} | {
            title: [row for row in rows if row["taught"] is taught]
            for title, taught in (("taught", True), ("new", False))
        }
        result[kind] = {title: _share(some) for title, some in parts.items()} | {"names": len(rows)}
    return result


def _share(rows: Sequence[Mapping[str, Any]]) -> float | None:
    before = sum(row["own"] for row in rows)
    return 100 * sum(row["ap"] or 0.0 for row in rows) / before if before else None


def fires(found: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    """For each kind of absent word, in how many percent of the images one of them fires, on average."""
    found = list(found)
    return {kind: report.mean(value for one in found for value in one["absent"][kind].values()) for kind in ABSENT}


def goals(result: Mapping[str, Any]) -> list[Tree]:
    """What synonyms keep, and how rarely absent words fire."""
    synonyms = report.aim("AP that synonyms keep, %", KEPT, result["kept"]["synonym"]["all"] or 0.0)
    return [
        synonyms,
        *({"what": kind, **report.bar(result["fires"][kind] or 0.0, most)} for kind, most in FIRES.items()),
    ]


def page(result: Mapping[str, Any]) -> str:
    """The page of a result: what is kept by kind and by dataset, the worst words, what fires."""
    datasets = result["datasets"]
    head = ["called by", "names", "kept, %", "taught words", "new words", *datasets]
    rows = [
        [
            kind,
            str(result["kept"][kind]["names"]),
            *(report.number(result["kept"][kind][part]) for part in ("all", "taught", "new")),
            *(report.number(_share(one["kinds"][kind])) for one in datasets.values()),
        ]
        for kind in KINDS
    ]
    absent = [
        [kind, report.number(result["fires"][kind])]
        + [report.number(report.mean(one["absent"][kind].values())) for one in datasets.values()]
        for kind in ABSENT
    ]
    return report.joined(
        "# Names that were not trained",
        f"{sum(one['images'] for one in datasets.values())} images of evaluation splits. {report.facts(result)}.",
        "AP that is left when a name is called by another word, in % of its own:",
        report.table(head, rows),
        "Share of images, in %, in which a word for what is not there fires, on average over the words:",
        report.table(["words", "all", *datasets], absent),
        report.aims_list(result["bars"][:1]),
        "\n".join(
            f"- {one['what']} words fire in {report.number(one['value'])} % of images ({report.bar_text(one)})"
            for one in result["bars"][1:]
        ),
        f"Lost most: {', '.join(worst(datasets))}.",
        f"Fire most: {', '.join(loudest(datasets))}.",
    )


def worst(datasets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The synonyms and spellings that lose most AP."""
    rows = [row for one in datasets.values() for kind in KINDS[:2] for row in one["kinds"][kind]]
    rows.sort(key=lambda row: (row["ap"] or 0.0) - row["own"])
    return [f'"{row["word"]}" for {row["name"]} ({row["own"]:.1f} to {row["ap"] or 0.0:.1f})' for row in rows[:_WORST]]


def loudest(datasets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The absent words that fire in most images."""
    words = [
        (share, word, name)
        for name, one in datasets.items()
        for kind in ABSENT
        for word, share in one["absent"][kind].items()
    ]
    return [f'"{word}" in {name} ({share:.0f} %)' for share, word, name in sorted(words, reverse=True)[:_WORST]]


if __name__ == "__main__":
    sys.exit(main())
