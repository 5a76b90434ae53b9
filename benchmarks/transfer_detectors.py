"""For detectors of transformers, are METR's weights a better beginning than a backbone, or than their own pretraining?

    python benchmarks/transfer_detectors.py --profile trial --data FOLDER

Leaves a dataset out and fine-tunes RT-DETR, D-FINE, RF-DETR, Deformable DETR and DAB-DETR on it with transformers'
Trainer, from

- `own`: the ImageNet backbone alone, everything else as transformers initialises it,
- `untrained`: the same backbone, everything else as `metr transfer` leaves it before METR has learnt anything: what
  this gains is the gain of a better initialisation (of queries above all), and not of weights,
- `joint`: the detector's own pretraining on the other datasets, labels side by side; its classification heads begin
  as those of `untrained`,
- `metr`: `metr transfer` of a METR of the detector's family, pretrained on the same images in the same order.

All arms of a detector have one configuration: that of the METR whose weights it can take.

Profile `trial`, one thread of an Intel Xeon: 364 minutes of training steps, one seed
(results/transfer-detectors-trial.json). AP on bccd's val split, own / untrained / joint / metr: RT-DETR 10.6 / 32.2 /
36.6 / 49.7, D-FINE 33.3 / 30.4 / 31.8 / 41.3, RF-DETR 1.1 / 14.1 / 31.2 / 20.7, Deformable DETR 2.1 / 8.0 / 16.6 /
15.6, DAB-DETR 0.1 / 0.3 / 0.5 / 3.2. Over the better backbone: +8.5 in the mean (goal: +3.0); against own
pretraining: +2.8. Profile `gpu` has not been run.

Results: `results/transfer-detectors-PROFILE.json`, `.md` and `.png`, written whenever the command ends, with what is
finished until then. Runs: `--out`, resumable; `--detectors` does only some.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import transformers
from pydantic import Field
from rich.console import Console
from transformers import PreTrainedModel

import report
import runner
from closed_set import concatenated
from detector_training import (
    TRAINED,
    Collator,
    SampledImages,
    TrainerConfig,
    backbone_alone,
    detector_optimizer,
    drop_checkpoints,
    evaluate_detector,
    renamed,
    train_detector,
    training_arguments,
)
from metr.config import Config, Tree, merge
from metr.conversion.export import colours_of, transfer
from metr.conversion.targets import find_target
from metr.conversion.transfer import to_detector
from metr.data.dataset import DetectionDataset
from metr.data.joint import JointData, open_joint
from metr.data.transforms import build_transforms
from metr.devices import resolved_device
from metr.errors import ConfigError
from metr.evaluation.coco import CocoResult
from metr.model import METR
from metr.models.detector import Detector
from metr.training.train import training_parts
from runner import DATASETS, Run, Study

DETECTORS = ("rt_detr", "d_fine", "rf_detr", "deformable_detr", "dab_detr")
TITLES = {
    "own": "ImageNet backbone, transformers' start",
    "untrained": "ImageNet backbone, METR's start",
    "joint": "own pretraining, concatenated labels",
    "metr": "METR's weights",
}
ARMS = tuple(TITLES)
KINDS = {"metr": "METR", "joint": "its own"}
"""What is pretrained: METR, and the detector itself."""
AIM = 3.0
"""The gain in mean AP that is aimed at; besides, each detector is to gain, and to lose nothing in the mean against its
own pretraining."""


class DetectorConfig(Config):
    """One detector of transformers: the METR whose weights fit it, and how Trainer trains it in every arm."""

    model: dict[str, Any]  # METR's family, laid over the size `nano`
    trainer: TrainerConfig
    pretrain: dict[str, Any] = Field(default_factory=dict)  # laid over the profile's, for both of its pretrainings
    steps: int | None = None  # of its fine-tuning, if not the profile's


class Profile(Config):
    """What is run.

    Images, augmentation, batch size, steps and seed of METR's pretraining are those of the detectors' own pretraining
    too; augmentation and batch size also those of fine-tuning.
    """

    left_out: str  # nothing is pretrained on it, and all arms are fine-tuned on it
    seeds: tuple[int, ...]  # each fine-tunes every arm once; pretrainings go by the first alone
    steps: int  # of fine-tuning, in every arm
    pretrain: dict[str, Any]  # METR's pretraining, laid over the size `nano`
    detectors: dict[str, DetectorConfig]


class Bench:
    """The runs of one detector, and what they begin with.

    Raises:
        ConfigError: the recipe pads images, which RT-DETR would see.
    """

    def __init__(self, detector: str, study: Study, profile: Profile) -> None:
        self.detector, self.study, self.profile = detector, study, profile
        self.config, self.target, self.home = profile.detectors[detector], find_target(detector), study.out / detector
        self.steps = self.config.steps or profile.steps
        tree = merge(profile.pretrain, self.config.pretrain, {"model": self.config.model})
        self.recipe = study.recipe(tree)
        if self.recipe.augmentation.resize.mode != "stretch":
            what, where = "expected stretch: images of one shape, without padding", "pretrain.augmentation.resize.mode"
            raise ConfigError(what, where=where)
        self.names = [name for name in DATASETS if name != profile.left_out]
        trainer = self.config.trainer.model_dump(mode="json")
        self.settings = {"detector": detector, "trainer": trainer, "configuration": self.recipe}
        title, folder = f"{detector}, pretraining of METR", self.home / "pretrained-metr"
        metr = runner.training_run(study, folder, self.recipe, study.datasets(self.names), title)
        self.pretrained = {"metr": metr, "joint": self._joint_run()}
        self.arms = {(arm, seed): self._arm_run(arm, seed) for seed in profile.seeds for arm in ARMS}

    @property
    def runs(self) -> list[Run]:
        """All runs in their order."""
        return [*self.pretrained.values(), *self.arms.values()]

    @cached_property
    def others(self) -> JointData:
        """The datasets of pretraining."""
        return open_joint(self.study.datasets(self.names))

    @cached_property
    def left_out(self) -> JointData:
        """The dataset of fine-tuning."""
        return open_joint(self.study.datasets([self.profile.left_out]))

    @cached_property
    def untrained(self) -> METR:
        """METR before its pretraining: an ImageNet backbone, and the rest at random."""
        parts = training_parts(self.others, self.recipe, Console(quiet=True))
        assert isinstance(parts.network, Detector)
        return METR(parts.network, parts.checkpoint)

    @cached_property
    def collate(self) -> Collator:
        """Makes batches in the colours of METR's backbone."""
        return Collator(colours_of(self.untrained.network))

    def split(self, *, training: bool) -> DetectionDataset:
        """The left-out dataset's training images, augmented as in pretraining, or its val images."""
        source = self.left_out.sources[0]
        annotations = self.left_out.train_split(source) if training else source.evaluation_split()[1]
        transforms = build_transforms(self.recipe.augmentation, training=training)
        return DetectionDataset(annotations, self.left_out.vocabulary, transforms)

    def start(self, arm: str, seed: int) -> PreTrainedModel:
        """The detector before an arm's first step; what it was pretrained with is finished."""
        names = replace(self.left_out.vocabulary, datasets={})  # bare, as `metr transfer --names` takes them
        if arm == "own":
            return backbone_alone(self.target, self.untrained.network, names.names, seed)
        metr = self.untrained
        if arm == "metr":
            metr = METR.from_pretrained(self.pretrained["metr"].folder / "last", device="cpu")
        model: PreTrainedModel = to_detector(metr, self.detector, names).model
        if arm == "joint":
            model = renamed(self.pretrained["joint"].folder / TRAINED, names.names, model, seed)
        return model

    def _joint_run(self) -> Run:
        """The detector's own pretraining on concatenated labels.

        It begins with METR's weights before their first step, so both pretrainings begin with the same numbers.
        """
        folder = self.home / "pretrained-joint"

        def work() -> Tree:
            loop = self.recipe.train.loop
            labels, names = concatenated(self.others.vocabulary)
            rows = [self.others.vocabulary.index_of(name) for name in names]
            text = self.untrained.checkpoint.text_embeddings[rows]
            model = transfer(self.target, self.untrained.network, labels.names, text).model
            transforms = build_transforms(self.recipe.augmentation, training=True)
            splits = [DetectionDataset(self.others.train_split(one), labels, transforms) for one in self.others.sources]
            images = SampledImages(splits, self.recipe.loader, loop.steps, loop.seed)
            seconds = self._train(model, images, folder, loop.seed)
            drop_checkpoints(folder)
            return {"data": list(images.mixed.lengths), "images_seen": len(images), "training_seconds": seconds}

        settings = self.settings | {"datasets": self.names}
        return Run(folder=folder, title=f"{self.detector}, pretraining of its own", settings=settings, work=work)

    def _arm_run(self, arm: str, seed: int) -> Run:
        folder = self.home / f"{seed}-{arm}"

        def work() -> Tree:
            model = self.start(arm, seed)
            before = self._evaluate(model).ap if arm == "metr" else None
            images = self.split(training=True)
            seconds = self._train(model, SampledImages([images], self.recipe.loader, self.steps, seed), folder, seed)
            after = self._evaluate(model)
            drop_checkpoints(folder)
            found = {"ap": after.ap or 0.0, "ap50": after.ap50 or 0.0, "ap_before": before}
            took = {"images": len(images), "steps": self.steps, "training_seconds": seconds}
            return {"detector": self.detector, "arm": arm, "seed": seed, **found, **took}

        settings = {"left_out": self.profile.left_out, "arm": arm, "seed": seed, "steps": self.steps, **self.settings}
        return Run(folder=folder, title=run_title(self.detector, arm, seed), settings=settings, work=work)

    def _train(self, model: PreTrainedModel, images: SampledImages, folder: Path, seed: int) -> float:
        steps, config = len(images) // self.recipe.loader.batch_size, self.config.trainer
        arguments = training_arguments(folder, steps, seed, config, self.recipe)
        optimizer = detector_optimizer(model, config, self.target.backbone)
        return train_detector(model, images, self.collate, arguments, optimizer)

    def _evaluate(self, model: PreTrainedModel) -> CocoResult:
        network: Any = model
        network.to(resolved_device(self.recipe.train.loop.device))
        return evaluate_detector(network, self.split(training=False), self.left_out.vocabulary.names, self.collate)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the study; see `runner.exit_status`."""
    parser = runner.option_parser(__doc__, ("trial", "gpu"))
    parser.add_argument("--detectors", nargs="+", choices=DETECTORS, default=DETECTORS, help="only some of them")
    study, given = runner.parse_study(parser, "transfer-detectors", arguments)
    return runner.exit_status(lambda: conduct(study, given["detectors"]))


def conduct(study: Study, detectors: Sequence[str]) -> bool:
    """Does the runs of some detectors that are not finished, writes what is of all; False where it was stopped."""
    profile = Profile.checked(study.read_profile(), where=study.profile)
    study.datasets()
    benches = [Bench(name, study, profile) for name in profile.detectors]
    chosen = [run for bench in benches if bench.detector in detectors for run in bench.runs]
    done = runner.run_all(study, [run for bench in benches for run in bench.runs], chosen)
    result = summary(study, profile, benches)
    if result["rows"]:
        report.draw_bars(study.stem.with_suffix(".png"), bars(result["rows"]), TITLES)
        report.write_result(study.stem, result, page(result))
    return done


def run_title(detector: str, arm: str, seed: int) -> str:
    """The run of an arm in a few words."""
    return f"{detector}, {arm}, seed {seed}"


def summary(study: Study, profile: Profile, benches: Sequence[Bench]) -> Tree:
    """The result as the JSON file has it."""
    arms = runner.reports([run for bench in benches for run in bench.arms.values()])
    before = [
        {"detector": bench.detector, "kind": kind, "images": one["images_seen"]}
        | {key: one[key] for key in ("training_seconds", "commit")}
        for bench in benches
        for kind, run in bench.pretrained.items()
        for one in runner.reports([run])
    ]
    rows = table_rows(arms)
    return {
        **runner.circumstances("transfer_detectors", report.all_commits([*before, *arms])),
        "profile": study.profile,
        "complete": len(arms) == sum(len(bench.arms) for bench in benches),
        "transformers": transformers.__version__,
        "written_by": runner.commit(),
        "settings": profile.model_dump(mode="json") | {"set": list(study.overrides)},
        "training_seconds": round(sum(one["training_seconds"] for one in (*arms, *before))),
        "pretraining": before,
        "runs": arms,
        "rows": rows,
        "bars": goals(rows) if len(rows) == len(benches) else [],
    }


def table_rows(arms: Sequence[Tree]) -> list[Tree]:
    """One row for each detector of which every arm has finished a seed."""
    before = {(one["detector"], one["seed"]): one["ap_before"] for one in arms if one["arm"] == "metr"}
    rows = report.compare_arms(arms, ("detector",), ARMS)
    for row in rows:
        ap = row["ap"]
        row["before"] = before[row["detector"], row["seeds"][0]]
        row["gain"] = ap["metr"] - max(ap["own"], ap["untrained"])
        row["over_joint"] = ap["metr"] - ap["joint"]
    return rows


def goals(rows: Sequence[Tree]) -> list[Tree]:
    """A gain for every detector, the one in the mean, and that over own pretraining."""
    each = [report.aim(f"gain of {title(row)}", 0.0, row["gain"], above=True) for row in rows]
    own = report.aim("mean gain over own pretraining", 0.0, mean_of(rows, "over_joint"))
    return [*each, report.aim("mean gain", AIM, mean_of(rows, "gain")), own]


def title(values: Mapping[str, Any]) -> str:
    """The name of the detector that a row or run is about."""
    return find_target(values["detector"]).title


def mean_of(rows: Sequence[Tree], key: str) -> float:
    """The mean of a number over the detectors."""
    return float(sum(row[key] for row in rows) / len(rows))


def mean_ap(rows: Sequence[Tree]) -> dict[str, float]:
    """The mean AP of each arm over the detectors."""
    return {arm: sum(row["ap"][arm] for row in rows) / len(rows) for arm in ARMS}


def page(result: Mapping[str, Any]) -> str:
    """The page of a result: how it was measured, the table, the goals, what got worse."""
    rows, before = result["rows"], result["pretraining"]
    gains = {"gain": "gain over the better backbone", "over_joint": "gain over own pretraining"}
    lines = [
        [
            title(row),
            *(report.ap_of_seeds(row, arm) for arm in ARMS),
            *(report.number(row[key], "+.1f") for key in gains),
            report.number(row["before"]),
        ]
        for row in rows
    ]
    if len(rows) > 1:
        values = [
            *(f"{ap:.1f}" for ap in mean_ap(rows).values()),
            *(report.number(mean_of(rows, key), "+.1f") for key in gains),
        ]
        lines.append(["**mean**", *(f"**{value}**" for value in values), ""])
    behind = [
        f"{title(row)} behind {TITLES[arm]} ({row['ap']['metr'] - row['ap'][arm]:+.1f})"
        for row in rows
        for arm in ARMS
        if row["ap"]["metr"] < row["ap"][arm]
    ]
    minutes: dict[str, list[str]] = {}
    for one in before:
        minutes.setdefault(title(one), []).append(f"{one['training_seconds'] / 60:.1f}")
    told = ", ".join(f"{name} {' and '.join(both)}" for name, both in minutes.items() if len(both) > 1)
    made = [(f"{one['detector']}, pretraining of {KINDS[one['kind']]}", one["commit"]) for one in before]
    made += [(run_title(one["detector"], one["arm"], one["seed"]), one["commit"]) for one in result["runs"]]
    return report.joined(
        f"# Transfer to other detectors: {result['profile']}",
        f"{report.profile_of(result)}: {result['training_seconds'] / 60:.0f} minutes of training steps on "
        f"{report.facts(result)}, transformers {result['transformers']}.",
        preface(result),
        report.table(["detector", *TITLES.values(), *gains.values(), "METR's weights before any step"], lines),
        report.aims_list(result["bars"]),
        f"Worse with METR's weights: {', '.join(behind) or 'nothing'}.",
        f"Minutes of pretraining, METR's and the detector's own: {told}." if told else "",
        report.runs_by_commit(made),
    )


def preface(result: Mapping[str, Any]) -> str:
    """What the numbers are, and how alike the arms were treated."""
    rows = {title(row): row for row in result["rows"]}
    images: dict[str, set[int]] = {}
    for one in result["pretraining"]:
        images.setdefault(title(one), set()).add(one["images"])
    uneven = any(len(several) > 1 for several in images.values())
    return (
        f"AP (0 to 100) on the val split of {result['settings']['left_out']}, after "
        f"{by_detector({name: report.steps_of(row) for name, row in rows.items()})} steps of transformers' Trainer on "
        f"its {report.number_range(row['images'] for row in rows.values())} training images, last weights; every arm "
        f"of a detector has the same sizes and sees the same images in the same order, {report.same_steps(rows)}. "
        "METR and the detectors themselves were pretrained on "
        f"{by_detector({name: report.number_range(several) for name, several in images.items()})} images sampled from "
        f"the other datasets, {'**not the same number for METR and the detector**' if uneven else 'the same ones'}. "
        "In brackets: the range of the seeds."
    )


def by_detector(values: Mapping[str, str]) -> str:
    """A value that may differ from detector to detector, each told once."""
    titles: dict[str, list[str]] = {}
    for name, value in values.items():
        titles.setdefault(value, []).append(name)
    told = [f"{value} ({', '.join(names)})" for value, names in titles.items()]
    return " or ".join(titles if len(titles) == 1 else told)


def bars(rows: Sequence[Tree]) -> dict[str, dict[str, dict[str, float]]]:
    """AP of each arm: a group for each detector and one for their mean."""
    return {"AP": {title(row): row["ap"] for row in rows} | ({"mean": mean_ap(rows)} if len(rows) > 1 else {})}


if __name__ == "__main__":
    sys.exit(main())
