"""How well does a trained METR answer to names that it was not trained on?

    python benchmarks/names.py --data FOLDER --model checkpoints/metr-nano

Other words for trained names, by kind (synonyms, plurals, other languages, slips and so on), and names of things that
no image shows are in `profiles/names.yaml`. Each image of the evaluation splits is encoded once, and then asked for:

    own       all names of its dataset
    words     for every kind, all names of its dataset; those with a word of the kind go by it, and what is found by the
              word counts as the name
    absent    the names of its dataset, and names of things that are in no image: related ones, unrelated ones, nonsense

    kept      sum of the words' AP / sum of the AP of the names that they stand for, in per cent
    fires     percentage of images in which an absent name is found as `metr detect` shows it: with the thresholds of
              the checkpoint, 0.3 for names that have none

Results: `results/names-PROFILE.json` and `.md`. Runs: `--out`, one a dataset; what was measured is not measured again.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import report
import runner
from detection_defaults import Encoded, encoded
from metr.config import Tree, read_yaml
from metr.errors import ConfigError
from metr.evaluation.coco import CocoScorer
from metr.inference.postprocess import postprocess
from metr.model import METR
from metr.structures import Detections
from runner import Run, Study

KINDS = ("synonym", "plural", "hypernym", "narrower", "language", "misspelling", "spelling")
ABSENT = ("related", "unrelated", "nonsense")
SYNONYMS_KEEP = 80.0  # %
SILENT = {"related": 90.0, "unrelated": 95.0, "nonsense": 95.0}  # % of images
WORST = 12

Word = Mapping[str, Any]
"""name, kind, word; AP of the name as it is (`before`) and by the word (`after`)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the study; see `runner.exit_status`."""
    parser = runner.option_parser(__doc__)
    parser.add_argument("--model", default="checkpoints/metr-nano", help="a checkpoint or a run folder")
    parser.add_argument("--data", type=Path, required=True, help="the folder of the datasets, one folder each")
    parser.add_argument("--words", type=Path, default=runner.HERE / "profiles" / "names.yaml", help="other names")
    parser.add_argument("--profile", help="what the result files are called after; by default the model's folder")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="the folder of all runs; runs/names-PROFILE by default")
    given = vars(parser.parse_args(arguments))
    profile = given.pop("profile") or Path(given["model"]).name
    out = given.pop("out") or Path("runs") / f"names-{profile}"
    study = Study(name="names", profile=profile, out=out, data=given.pop("data"), results=given.pop("results"))
    return runner.exit_status(lambda: conduct(study, given))


def conduct(study: Study, options: Mapping[str, Any]) -> bool:
    """Measures every dataset that was not measured yet, and writes the result."""
    torch.set_num_threads(options["threads"])
    model = METR.from_pretrained(options["model"], device="cpu")
    model.keeps = False  # hundreds of warnings about names that were not trained
    profile = read_words(options["words"], model)
    runs = [measuring(study, model, options["model"], name, profile) for name in profile["datasets"]]
    done = runner.run_all(study, runs)
    if done:
        found = runner.reports(runs)
        result = {
            **runner.circumstances("names", report.all_commits(found), "cpu"),
            "profile": study.profile,
            "steps": model.checkpoint.training.get("step"),
            **summary(found),
        }
        report.write_result(study.stem, result, page(result))
    return done


def read_words(path: Path, model: METR) -> Tree:
    """What a file of other names says of the datasets that a model was trained on.

    Returns:
        `datasets`: of each, its `rounds` (kind, word of each name) and `absent` names by kind.

    Raises:
        ConfigError: there are none, a name was not trained, a kind is unknown, or two names would be asked alike.
    """
    tree = read_yaml(path)
    trained = model.vocabulary.datasets
    found: Tree = {}
    for name in sorted(tree.get("datasets", {}).keys() & trained.keys()):
        given = tree["datasets"][name]
        where = f"{path} (datasets.{name})"
        absent = {kind: tree.get(f"absent_{kind}", []) for kind in ABSENT} | {"related": given["absent_related"]}
        for kind, strangers in absent.items():
            if again := sorted({*strangers}.intersection(trained[name])):
                raise ConfigError(f"expected names of no image, found names of the dataset: {again}", where=where)
            if len({*strangers}) < len(strangers):
                raise ConfigError(f"expected each of the absent names once ({kind})", where=where)
        found[name] = {"rounds": rounds(given["names"], trained[name], where), "absent": absent}
    if not found:
        hint = f"trained were {sorted(trained)}; name another file with --words"
        raise ConfigError(
            f"expected datasets of training, found {sorted(tree.get('datasets', {}))}", where=path, hint=hint
        )
    return {"datasets": found}


def rounds(
    names: Mapping[str, Mapping[str, Any]], trained: Sequence[str], where: str
) -> list[tuple[str, dict[str, str]]]:
    """What is asked one after the other: of each kind the first word of every name that has one, then the second ...

    Raises:
        ConfigError: a name was not trained, a kind is unknown, or two names would be asked alike.
    """
    if strange := sorted(names.keys() - {*trained}):
        raise ConfigError(f"expected names of training, found {strange}", where=where, hint=f"trained were {trained}")
    if strange := sorted({kind for kinds in names.values() for kind in kinds}.difference(KINDS)):
        raise ConfigError(f"expected kinds of {KINDS}, found {strange}", where=where)
    found = []
    for kind in KINDS:
        words = {name: several(kinds[kind]) for name, kinds in names.items() if kind in kinds}
        for turn in range(max(map(len, words.values()), default=0)):
            asked = {name: some[turn] for name, some in words.items() if turn < len(some)}
            all_asked = [asked.get(name, name) for name in trained]
            if again := sorted({word for word in all_asked if all_asked.count(word) > 1}):
                raise ConfigError(f"expected different words, found {again} twice", where=f"{where[:-1]}, {kind})")
            found.append((kind, asked))
    return found


def several(words: str | Sequence[str]) -> list[str]:
    """A word, or several, as a list."""
    return [words] if isinstance(words, str) else list(words)


def measuring(study: Study, model: METR, source: str, dataset: str, profile: Mapping[str, Any]) -> Run:
    """The run that measures one dataset.

    Raises:
        DataError: the dataset is not in the folder.
    """
    (path,) = study.datasets([dataset])
    words = profile["datasets"][dataset]
    settings = {"model": source, "steps": model.checkpoint.training.get("step"), "dataset": dataset, **words}

    def work() -> Tree:
        one = encoded(model, path)
        found = {"dataset": dataset, "images": len(one.annotations), "words": by_word(model, one, words["rounds"])}
        return found | {"absent": {kind: fires(model, one, names) for kind, names in words["absent"].items()}}

    return Run(folder=study.out / dataset, title=f"names: {dataset}", settings=settings, work=work)


def by_word(model: METR, one: Encoded, rounds: Iterable[tuple[str, Mapping[str, str]]]) -> list[Word]:
    """AP of every name before, and by each of its words; names without objects are left out."""
    scorer = CocoScorer(one.annotations, [name.strip() for name in one.annotations.categories])
    before = aps(scorer, ask(model, one, one.names))
    words: list[Word] = []
    for kind, asked in rounds:
        after = aps(scorer, ask(model, one, [asked.get(name, name) for name in one.names], one.names))
        words += [
            {"kind": kind, "name": name, "word": word, "before": before[name], "after": after[name]}
            for name, word in asked.items()
            if name in before
        ]
    return words


def aps(scorer: CocoScorer, found: Mapping[int | str, Detections]) -> dict[str, float]:
    """AP of each name that has objects."""
    return {each.name: each.ap for each in scorer.score(found).categories if each.ap is not None}


def ask(
    model: METR, one: Encoded, names: Sequence[str], called: Sequence[str] | None = None
) -> dict[int | str, Detections]:
    """What is found in each image when it is asked for these names, as a predictor asks; `called`: what they mean."""
    predictor = model.predictor(names)
    text = model.network.project(predictor.text)
    found: dict[int | str, Detections] = {}
    for memory, sizes, images in one.batches:
        with torch.inference_mode():
            output = model.network.detect(memory, text, limits=predictor.limits)
        each = postprocess(output, sizes, names, predictor.config.postprocess)
        found |= {image: replace(it, names=tuple(called or names)) for image, it in zip(images, each, strict=True)}
    return found


def fires(model: METR, one: Encoded, absent: Sequence[str]) -> dict[str, float]:
    """The percentage of images in which each absent name is shown, when asked for together with the dataset's names."""
    names = (*one.names, *absent)
    thresholds = model.thresholds(None, names)
    shown = [thresholds.shown(found) for found in ask(model, one, names).values()]
    seen = [{found.names[label] for label in found.labels.tolist()} for found in shown]
    return {name: 100 * sum(name in some for some in seen) / max(len(seen), 1) for name in absent}


def summary(found: Sequence[Mapping[str, Any]]) -> Tree:
    """The figures of all datasets by kind, their aims, and what every dataset found."""
    words = [word for one in found for word in one["words"]]
    kinds = {kind: of_kind(words, kind) for kind in KINDS}
    absent = {kind: report.mean(rate for one in found for rate in one["absent"][kind].values()) for kind in ABSENT}
    aims = []
    if (kept := kinds["synonym"]["kept"]) is not None:
        aims.append(report.aim("AP that synonyms keep, %", SYNONYMS_KEEP, kept))
    for kind, wanted in SILENT.items():
        if (rate := absent[kind]) is not None:
            aims.append(report.aim(f"images in which a name of the kind `{kind}` stays silent, %", wanted, 100 - rate))
    datasets = {
        one["dataset"]: {key: one[key] for key in ("images", "words", "absent")}
        | {
            "kept": {kind: of_kind(one["words"], kind)["kept"] for kind in KINDS},
            "fires": {kind: report.mean(one["absent"][kind].values()) for kind in ABSENT},
        }
        for one in found
    }
    return {"aims": aims, "kinds": kinds, "absent": absent, "datasets": datasets}


def of_kind(words: Iterable[Word], kind: str) -> Tree:
    """The number of words of a kind, the mean AP of their names and of them, and the share that they keep, in %."""
    some = [word for word in words if word["kind"] == kind]
    before, after = (report.mean(word[key] for word in some) for key in ("before", "after"))
    kept = 100 * after / before if before and after is not None else None
    return {"words": len(some), "before": before, "after": after, "kept": kept}


def page(result: Mapping[str, Any]) -> str:
    """The page of a result: kinds, datasets, the words that lost most, the absent names that were shown most."""
    kinds = [
        [kind, str(it["words"]), *(report.number(it[key]) for key in ("before", "after", "kept"))]
        for kind, it in result["kinds"].items()
    ]
    datasets = [
        [name, str(one["images"]), *(report.number(one["kept"][kind], ".0f") for kind in KINDS)]
        for name, one in result["datasets"].items()
    ]
    absent = [
        [name, *(report.number(one["fires"][kind]) for kind in ABSENT)] for name, one in result["datasets"].items()
    ]
    absent.append(["**mean of all names**", *(report.number(result["absent"][kind]) for kind in ABSENT)])
    return report.joined(
        report.aims_list(result["aims"]),
        report.table(["kind of word", "words", "AP of the names", "AP by the words", "kept, %"], kinds),
        "AP kept, %, by dataset:",
        report.table(["dataset", "images", *KINDS], datasets),
        "Images in which a name that is in none is found, %:",
        report.table(["dataset", *ABSENT], absent),
        "The words that lose most AP:",
        report.table(["dataset", "name", "kind", "word", "AP before", "after"], lost_most(result), left=4),
        "The absent names that are found in most images:",
        report.table(["dataset", "kind", "name", "% of images"], found_most(result), left=3),
        f"`{result['profile']}`, {result['steps']} steps. {report.facts(result)}.",
    )


def lost_most(result: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the words that lose most AP."""
    every = [(name, word) for name, one in result["datasets"].items() for word in one["words"]]
    every.sort(key=lambda pair: float(pair[1]["after"] - pair[1]["before"]))
    return [
        [name, *(word[key] for key in ("name", "kind", "word")), *(f"{word[key]:.1f}" for key in ("before", "after"))]
        for name, word in every[:WORST]
    ]


def found_most(result: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the absent names that are found in most images."""
    every = [
        (rate, [dataset, kind, name])
        for dataset, one in result["datasets"].items()
        for kind in ABSENT
        for name, rate in one["absent"][kind].items()
    ]
    every.sort(key=lambda pair: -pair[0])
    return [[*cells, f"{rate:.1f}"] for rate, cells in every[:WORST] if rate]


if __name__ == "__main__":
    sys.exit(main())
