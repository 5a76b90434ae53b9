"""Does a METR that adopts a detector find what the detector finds, and is it the better start for new data?

    python benchmarks/adopt.py --profile trial --data FOLDER

Trains detectors of transformers (the sources) on four datasets, labels side by side, and lets METR adopt each. Then

- before any step: AP of the source, by its own image processor and post-processing, and of the adopted METR: asked for
  the dataset's names as METR detects, and for all names without suppression, as the source detects. METR clips boxes to
  the image and transformers does not: the source's AP is told with both, and compared with clipped boxes;
- fine-tuned on datasets that nothing has seen, with a tenth of the images and with all: the adopted METR (`adopted`),
  METR from the ImageNet backbone (`imagenet`), and the source itself with new class heads and transformers' Trainer
  (`transformers`). All three see the same images in the same order for the same steps;
- fine-tuned with rehearsal: how much of the AP on the source's own datasets remains.

A source whose mean AP is under its profile's `least_ap` is told, and not fine-tuned. Profile `gpu` has not
been run. Results: `results/adopt-PROFILE.json`, `.md` and `.png`, written whenever the command ends, with what is
finished until then. Runs: `--out`, resumable.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import transformers
from pydantic import Field
from rich.console import Console
from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection, PreTrainedModel

import report
import runner
from adopt_results import TITLES, bars, cells, page, run_title, source_result
from detector_training import (
    TRAINED,
    Collator,
    SampledImages,
    TrainerConfig,
    detector_optimizer,
    drop_checkpoints,
    renamed,
    train_detector,
    training_arguments,
)
from metr.config import Config, Tree, merge
from metr.conversion.adoption import import_detector
from metr.conversion.export import colours_of
from metr.conversion.targets import find_target
from metr.conversion.transfer import to_detector, trainer_result
from metr.data.config import SubsetConfig
from metr.data.dataset import DetectionDataset
from metr.data.joint import JointData, open_joint, subset_of
from metr.data.transforms import build_transforms
from metr.devices import resolved_device
from metr.evaluation.results import EvaluationConfig
from metr.evaluation.runner import evaluate
from metr.hub import quiet
from metr.inference.config import InferenceConfig, PostprocessConfig
from metr.model import METR
from metr.models.backbones.registered import register
from metr.models.detector import Detector
from metr.run_directory import RunDirectory
from metr.training.finetune import finetune
from metr.training.finetune_data import FinetuneOptions
from metr.training.parts import Outcome
from metr.training.train import fit, training_parts
from runner import Run, Study

Fraction = Annotated[float, Field(gt=0, le=1)]


class SourceConfig(Config):
    """One source: what it is, and how transformers' Trainer trains it."""

    detector: str
    model: dict[str, Any] = Field(default_factory=dict)
    """The METR, laid over the size `nano`, whose sizes and ImageNet backbone it has."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Its own configuration in transformers instead: then its weights begin at random."""
    augmentation: dict[str, Any] = Field(default_factory=dict)
    """Laid over the profile's, for the source and for all that begins with it."""
    steps: int
    trainer: TrainerConfig
    tuning: TrainerConfig
    least_ap: float = 0.0
    """The mean AP under which it is not fine-tuned."""


class Rehearsal(Config):
    """The fine-tuning of the adopted METR on all images of one new dataset, mixed with old ones."""

    new: str
    share: Annotated[float, Field(gt=0, lt=1)]
    """Fraction of the samples that are old."""
    steps: int
    seed: int


class Profile(Config):
    """What is run; training configurations are laid over the defaults of `metr train` and `metr finetune`."""

    old: tuple[str, ...]  # what sources are trained on
    new: tuple[str, ...]  # what is fine-tuned on
    seeds: dict[Fraction, tuple[int, ...]]  # for each fraction of the images those that choose them and train
    steps: dict[Fraction, int]  # of all arms for each fraction
    rehearsal: Rehearsal
    sources: list[SourceConfig]
    pretrain: dict[str, Any]  # images, batches and seed of the sources' training
    tuning: dict[str, Any]  # images and batches of all arms, schedule of METR's
    imagenet: dict[str, Any]  # the arm that begins with the backbone alone


class Bench:
    """The runs of one source, and what they begin with."""

    def __init__(self, source: SourceConfig, study: Study, profile: Profile) -> None:
        self.source, self.study, self.profile, self.detector = source, study, profile, source.detector
        self.target, self.home = find_target(source.detector), study.out / source.detector
        self.images = {"augmentation": source.augmentation}
        own = {"model": source.model, "train": {"loop": {"steps": source.steps}}}
        self.recipe = study.recipe(merge(profile.pretrain, self.images, own))
        self.trained = self._source_run()
        self.adopted = self._adopted_run()
        self.tuned = [
            self._tuned_run(cell)
            for cell in cells(profile.new, profile.seeds, ("transformers", "adopted"), self.detector)
        ]
        self.rehearsed = self._rehearsed_run()

    @cached_property
    def old(self) -> list[str]:
        """The datasets of the source as METR's verbs take them, no name in two of them."""
        return runner.distinct_datasets(self.study, self.profile.old)

    @cached_property
    def joint(self) -> JointData:
        """The same, opened."""
        return open_joint(self.old)

    @cached_property
    def untrained(self) -> METR:
        """METR before its first step: an ImageNet backbone, and the rest at random."""
        parts = training_parts(self.joint, self.recipe, Console(quiet=True))
        assert isinstance(parts.network, Detector)
        return METR(parts.network, parts.checkpoint)

    def fresh(self, names: Sequence[str], seed: int) -> PreTrainedModel:
        """The source before its first step: METR before its first step, transferred.

        Weights as transformers initialises RT-DETR (most normal with a deviation of 0.01) would not do: after 1,800
        steps from such a start the decoder's layers move no box, and whatever begins with that source keeps this fault.
        """
        if self.source.options:
            labels = {"id2label": dict(enumerate(names)), "label2id": {name: row for row, name in enumerate(names)}}
            config = AutoConfig.for_model(self.detector, **self.source.options, **labels)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = cast("Any", AutoModelForObjectDetection).from_config(config)
        else:
            model = to_detector(self.untrained, self.detector, names).model
        return cast("PreTrainedModel", model)

    @property
    def runs(self) -> list[Run]:
        """All runs in their order."""
        return [self.trained, self.adopted, *self.tuned, self.rehearsed]

    @property
    def learnt(self) -> bool:
        """Whether the source finds enough to be compared; False before that is known."""
        found = self.adopted.report()["datasets"] if self.adopted.finished else {}
        return bool(found) and (report.mean(one["source"] for one in found.values()) or 0.0) >= self.source.least_ap

    def _source_run(self) -> Run:
        folder, loop = self.home / "source", self.recipe.train.loop

        def work() -> Tree:
            model = self.fresh(self.joint.vocabulary.names, loop.seed)
            splits = [self.joint.train_split(one) for one in self.joint.sources]
            images = self._images(self.joint, splits, self.source.steps, loop.seed)
            seconds = self._train(model, images, folder, self.source.trainer, loop.seed)
            drop_checkpoints(folder)
            return {"steps": self.source.steps, "images_seen": len(images), "training_seconds": seconds}

        settings = {"datasets": self.profile.old, "configuration": self.recipe, "source": self.source}
        return Run(folder=folder, title=f"{self.detector}, training of the source", settings=settings, work=work)

    def _adopted_run(self) -> Run:
        folder = self.home / "adopted"

        def work() -> Tree:
            text, device = self.recipe.text, self.recipe.train.loop.device
            model, told = import_detector(self.trained.folder / TRAINED, text=text, device=device)
            model.save_pretrained(folder / TRAINED)
            # as METR detects, and without the suppression that the source does not have
            bare = InferenceConfig(postprocess=PostprocessConfig(nms_iou=None))
            asked = (EvaluationConfig(modes=("own",)), EvaluationConfig(modes=("joint",), inference=bare))
            found = [evaluate(folder / TRAINED, self.old, device=device, config=one).datasets for one in asked]
            source = self._loaded_source()
            datasets = {
                own.name: {
                    "unclipped": trainer_result(data, *source).ap,
                    "source": trainer_result(data, *source, clipped=True).ap,
                    "own": own.ap("own"),
                    "joint": joint.ap("joint"),
                }
                for own, joint, data in zip(*found, self.old, strict=True)
            }
            return {"datasets": datasets, "notes": list(told.notes)}

        title = f"{self.detector}, adopted by METR: before any step"
        return Run(folder=folder, title=title, settings=self.trained.settings, work=work)

    def _tuned_run(self, cell: Tree) -> Run:
        """The fine-tuning of the source or of the METR that adopted it."""
        _, new, share, seed, arm = cell.values()
        folder, tree = self.home / new / f"{share:g}-{seed}-{arm}", merge(tuning_tree(self.profile, share), self.images)
        data, subset = self.study.datasets([new]), SubsetConfig(fraction=share, seed=seed)

        def work() -> Tree | None:
            joint = part_of(data, subset)
            if arm == "transformers":
                return {**cell, "images": joint.lengths[new], **self._tune_source(joint, data[0], folder, cell)}
            options = FinetuneOptions(overrides=self._overrides(tree), fraction=share, seed=seed, compare=False)
            resume = RunDirectory(folder).resumable
            begun = self.adopted.folder / TRAINED
            outcome = finetune(data, begun, folder, options, resume=resume, console=self.study.console).training
            return found_by(outcome, cell, joint, folder)

        settings = {**cell, "configuration": self.study.configuration(tree), "from": self.trained.settings}
        return Run(folder=folder, title=run_title(cell), settings=settings, work=work)

    def _tune_source(self, joint: JointData, data: str, folder: Path, cell: Tree) -> Tree:
        names, seed, steps = joint.vocabulary.names, cell["seed"], self.profile.steps[cell["share"]]
        begun = self.trained.folder / TRAINED
        model = renamed(begun, names, self.fresh(names, seed), seed)
        images = self._images(joint, [joint.train_split(one) for one in joint.sources], steps, seed)
        seconds = self._train(model, images, folder, self.source.tuning, seed)
        found = trainer_result(data, model, image_processor(begun), clipped=True)
        drop_checkpoints(folder)
        return {"ap": found.ap or 0.0, "ap50": found.ap50 or 0.0, "steps": steps, "training_seconds": seconds}

    def _rehearsed_run(self) -> Run:
        asked = self.profile.rehearsal
        folder, data = self.home / "rehearsed", self.study.datasets([asked.new])
        tree = merge(self.profile.tuning, self.images, {"train": {"loop": {"steps": asked.steps}}})

        def work() -> Tree | None:
            options = FinetuneOptions(
                overrides=self._overrides(tree),
                seed=asked.seed,
                rehearse=tuple(self.old),
                rehearse_fraction=asked.share,
            )
            begun, resume = self.adopted.folder / TRAINED, RunDirectory(folder).resumable
            outcome = finetune(data, begun, folder, options, resume=resume, console=self.study.console)
            if outcome.comparison is None:
                return None
            datasets = {
                one.dataset: {"before": one.before["own"], "after": one.after["own"]}
                for one in outcome.comparison.changes
            }
            seconds = runner.training_seconds(folder)
            return {"datasets": datasets, "steps": outcome.training.step, "training_seconds": seconds}

        settings = {"rehearsal": asked, "configuration": self.study.configuration(tree), "from": self.trained.settings}
        return Run(folder=folder, title=f"{self.detector}, adopted, with rehearsal", settings=settings, work=work)

    def _overrides(self, tree: Tree) -> tuple[str, ...]:
        # the network is the source's; one evaluation, of the last weights: no image that is reported chooses any
        kept = [one for one in self.study.overrides if not one.startswith(("model=", "model."))]
        return (*runner.as_overrides(tree), *kept, "train.loop.evaluate_every=0")

    def _images(self, joint: JointData, splits: Sequence[Any], steps: int, seed: int) -> SampledImages:
        transforms = build_transforms(self.recipe.augmentation, training=True)
        datasets = [DetectionDataset(split, joint.vocabulary, transforms) for split in splits]
        return SampledImages(datasets, self.recipe.loader, steps, seed)

    def _train(
        self, model: PreTrainedModel, images: SampledImages, folder: Path, config: TrainerConfig, seed: int
    ) -> float:
        """Trains a detector of transformers and saves it, its image processor beside it; gives seconds of steps."""
        colours = colours_of(self.untrained.network)
        steps = len(images) // self.recipe.loader.batch_size
        arguments = training_arguments(folder, steps, seed, config, self.recipe)
        optimizer = detector_optimizer(model, config, self.target.backbone)
        seconds = train_detector(model, images, Collator(colours), arguments, optimizer)
        self.target.image_processor(self.recipe.augmentation.resize, colours).save_pretrained(folder / TRAINED)
        return seconds

    def _loaded_source(self) -> tuple[Any, Any]:
        """The trained source and its image processor."""
        register()
        folder, auto = self.trained.folder / TRAINED, AutoModelForObjectDetection
        with quiet():
            model: Any = auto.from_pretrained(folder)
        return model.to(resolved_device(self.recipe.train.loop.device)), image_processor(folder)


def image_processor(folder: Path) -> Any:
    """The image processor beside a detector of transformers."""
    return cast("Any", AutoImageProcessor).from_pretrained(folder)


def tuning_tree(profile: Profile, share: float) -> Tree:
    """What METR is fine-tuned with, without what its verb adds by default."""
    return merge(profile.tuning, {"train": {"loop": {"steps": profile.steps[share]}}})


def part_of(data: Sequence[str], subset: SubsetConfig) -> JointData:
    """A dataset with a part of its training images."""
    joint = open_joint(data)
    return replace(joint, chosen={one.name: subset_of(one.split("train"), subset) for one in joint.sources})


def found_by(outcome: Outcome, cell: Tree, joint: JointData, folder: Path) -> Tree | None:
    """What a fine-tuning of METR found; None where it was interrupted."""
    if outcome.interrupted:
        return None
    took = {"steps": outcome.step, "training_seconds": runner.training_seconds(folder)}
    found = {"ap": outcome.metrics["AP"], "ap50": outcome.metrics["AP50"]}
    return {**cell, "images": joint.lengths[cell["new"]], **found, **took}


def imagenet_run(study: Study, profile: Profile, cell: Tree) -> Run:
    """The training of METR from the ImageNet backbone, which serves every source."""
    _, new, share, seed, arm = cell.values()
    folder, data = study.out / arm / new / f"{share:g}-{seed}", study.datasets([new])
    recipe = study.recipe(merge(tuning_tree(profile, share), profile.imagenet), f"train.loop.seed={seed}")

    def work() -> Tree | None:
        joint = part_of(data, SubsetConfig(fraction=share, seed=seed))
        parts = training_parts(joint, recipe, study.console)
        outcome = fit(parts, joint.evaluation(), recipe, folder, resume=True, console=study.console)
        return found_by(outcome, cell, joint, folder)

    return Run(folder=folder, title=run_title(cell), settings={**cell, "configuration": recipe}, work=work)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the study; see `runner.exit_status`."""
    parser = runner.option_parser(__doc__, ("trial", "gpu", "tiny"))
    study, _ = runner.parse_study(parser, "adopt", arguments)
    return runner.exit_status(lambda: conduct(study))


def conduct(study: Study) -> bool:
    """Does the runs that are not finished, writes what is; False where it was stopped."""
    profile = Profile.checked(study.read_profile(), where=study.profile)
    study.datasets([*profile.old, *profile.new])  # whether all are there
    benches = [Bench(source, study, profile) for source in profile.sources]
    alone = [
        imagenet_run(study, profile, cell) for cell in cells(profile.new, profile.seeds, ("imagenet",), "every source")
    ]
    for run in (*alone, *(run for bench in benches for run in bench.runs)):
        run.check()
    done = True
    for bench in benches:
        done = done and runner.run_all(study, [bench.trained, bench.adopted])
        done = done and (not bench.learnt or runner.run_all(study, [*alone, *bench.tuned, bench.rehearsed]))
    result = summary(study, profile, benches, alone, done)
    if result["sources"]:
        report.write_result(study.stem, result, page(result))
        if panels := bars(result):
            report.draw_bars(study.stem.with_suffix(".png"), panels, TITLES)
    return done


def summary(study: Study, profile: Profile, benches: Sequence[Bench], alone: Sequence[Run], done: bool) -> Tree:
    """The result as the JSON file has it."""
    finished = [run for run in (*alone, *(run for bench in benches for run in bench.runs)) if run.finished]
    told = runner.reports(finished)
    commits = [{"title": run.title, "commit": one["commit"]} for run, one in zip(finished, told, strict=True)]
    sources = []
    for bench in benches:
        named = {"trained": bench.trained, "adopted": bench.adopted, "rehearsed": bench.rehearsed}
        found = {name: one for name, run in named.items() for one in runner.reports([run])}
        if "trained" in found:
            tuned = runner.reports([*alone, *bench.tuned])
            compared = len(profile.new) * len(profile.seeds)
            sources.append(source_result(bench.detector, found, tuned, bench.source.least_ap, compared))
    return {
        **runner.circumstances("adopt", report.all_commits(told)),
        "profile": study.profile,
        "complete": done,
        "transformers": transformers.__version__,
        "written_by": runner.commit(),
        "settings": profile.model_dump(mode="json") | {"set": list(study.overrides)},
        "training_seconds": round(sum(one.get("training_seconds", 0.0) for one in told)),
        "commits": commits,
        "runs": [one for one in told if "arm" in one],
        "sources": sources,
        "bars": [bar for source in sources for bar in source["bars"]],
    }


if __name__ == "__main__":
    sys.exit(main())
