"""How fast does METR train a detector that it adopted, beside transformers' Trainer on the same detector?

    python benchmarks/adopted_speed.py --profile gpu --data FOLDER

Each detector is built as transformers publishes it, with random weights and the names of all datasets as its labels,
and METR adopts it. Then both train it, one after the other, on the same images in the same order, with the same workers
and precision:

    transformers    Trainer with its closed class head: the detector's own losses and denoising
    metr            `metr train --from`: every name is asked for at the places that the detector scores; the average of
                    the weights is kept as well

Images a second are those of the steps behind the first ones, with all that a training step waits for; evaluation and
saving are left out. Memory is the peak, on a GPU.

Profile `trial`, one thread of an Intel Xeon with AMX, bf16, 256 names (results/adopted-speed-trial.json): METR trains
D-FINE-N 1.49 times as fast as the Trainer, RF-DETR-N 2.79 times. Profile `gpu` has not been run.

Results: `results/adopted-speed-PROFILE.json` and `.md`, written whenever the command ends, with what is finished until
then. Runs: `--out`, resumable.
"""

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from accelerate.state import AcceleratorState
from pydantic import Field
from transformers import AutoConfig, AutoModelForObjectDetection, PreTrainedModel, Trainer, TrainerCallback

import report
import runner
from detector_training import Collator, SampledImages, TrainerConfig, detector_optimizer, training_arguments
from metr.config import Config, Tree, merge
from metr.conversion.targets import find_target
from metr.data.dataset import DetectionDataset
from metr.data.joint import JointData, open_joint
from metr.data.transforms import build_transforms
from metr.devices import peak_memory, resolved_device
from metr.evaluation.results import EvaluationConfig
from metr.hub import quiet
from metr.training.config import RunConfig
from metr.training.logger import read_metrics
from metr.training.train import train
from runner import Run, Study
from study_data import every_licensed, licensed_datasets

ARMS = ("transformers", "metr")
BEGUN = "detector"
"""The folder with the detector of random weights."""
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Published(Config):
    """A detector: transformers' `model_type`, the side of its images in pixels, and its configuration."""

    detector: str
    side: int
    options: dict[str, Any]


class Profile(Config):
    """What is run; the configuration is laid over the defaults of `metr train`."""

    datasets: tuple[str, ...] = ()  # all whose licence is stated, if none
    learning_rate: float
    detectors: dict[str, Published] = Field(min_length=1)
    recipe: dict[str, Any]


class Bench:
    """One detector and its two trainings.

    Attributes:
        name: What it is called.
        asked: What it is.
        study: Where its data and its runs are.
        profile: How long it is trained.
        data: The datasets as METR's verbs take them.
    """

    def __init__(self, name: str, asked: Published, study: Study, profile: Profile, data: Sequence[str]) -> None:
        self.name, self.asked, self.study, self.profile, self.data = name, asked, study, profile, data
        size = {"augmentation": {"resize": {"mode": "stretch", "size": asked.side}}}
        self.tree = merge(profile.recipe, size)
        self.recipe: RunConfig = study.recipe(self.tree)
        # up to its first record METR is not timed, and so is the Trainer not
        self.steps, self.first = self.recipe.train.loop.steps, self.recipe.train.loop.log_every
        self.home = study.out / name
        self.runs = [self._run(arm) for arm in ARMS]

    @cached_property
    def joint(self) -> JointData:
        """The datasets, opened."""
        return open_joint(self.data)

    def begun(self) -> Path:
        """The folder of the untrained detector, which is written if it is not there."""
        folder = self.home / BEGUN
        if not (folder / "preprocessor_config.json").is_file():
            names = self.joint.vocabulary.names
            labels = {"id2label": dict(enumerate(names)), "label2id": {name: row for row, name in enumerate(names)}}
            config = AutoConfig.for_model(self.asked.detector, **self.asked.options, **labels)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = cast("Any", AutoModelForObjectDetection).from_config(config)
            model.save_pretrained(folder)
            processor = find_target(self.asked.detector).image_processor(self.recipe.augmentation.resize, _IMAGENET)
            processor.save_pretrained(folder)
        return folder

    def _run(self, arm: str) -> Run:
        folder, device = self.home / arm, resolved_device(self.recipe.train.loop.device)

        def work() -> Tree | None:
            begun = self.begun()
            AcceleratorState._reset_state(reset_partial_state=True)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            found = self._by_trainer(begun, folder) if arm == "transformers" else self._by_metr(begun, folder)
            if found is None:
                return None
            common = {"detector": self.name, "arm": arm, "names": len(self.joint.vocabulary.names)}
            # on a CPU it would be that of the whole process
            return {**common, "memory_gib": peak_memory(device) if device.type == "cuda" else None, **found}

        settings = {"detector": self.asked, "profile": self.profile, "configuration": self.recipe, "arm": arm}
        return Run(folder=folder, title=f"{self.name}, {arm}", settings=settings, work=work)

    def _by_trainer(self, begun: Path, folder: Path) -> Tree:
        with quiet():
            model: PreTrainedModel = cast("Any", AutoModelForObjectDetection).from_pretrained(begun)
        splits = [self.joint.train_split(one) for one in self.joint.sources]
        transforms = build_transforms(self.recipe.augmentation, training=True)
        datasets = [DetectionDataset(split, self.joint.vocabulary, transforms) for split in splits]
        loop, config = self.recipe.train.loop, TrainerConfig(learning_rate=self.profile.learning_rate)
        images = SampledImages(datasets, self.recipe.loader, self.steps, loop.seed)
        told = training_arguments(folder, self.steps, loop.seed, config, self.recipe)
        told = replace(told, bf16=loop.precision == "bf16", save_strategy="no")
        optimizer = detector_optimizer(model, config, find_target(self.asked.detector).backbone)
        watch = Stopwatch(self.first)
        trainer = Trainer(
            model=model,
            args=told,
            data_collator=Collator(_IMAGENET),
            train_dataset=images,
            callbacks=[watch],
            optimizers=(optimizer, None),
        )
        with quiet():
            trainer.train()
        timed = self.steps - self.first
        return {"images_per_second": timed * self.recipe.loader.batch_size / watch.seconds}

    def _by_metr(self, begun: Path, folder: Path) -> Tree | None:
        run = folder / "run"
        shutil.rmtree(run, ignore_errors=True)  # a run that was stopped: its steps are timed from the first one again
        kept = [one for one in self.study.overrides if not one.startswith(("model=", "model."))]
        overrides = (*runner.as_overrides(self.tree), *kept)
        more: Tree = {"start": begun, "allow_empty": True, "evaluation": EvaluationConfig(modes=("own",))}
        outcome = train(self.data, run, overrides=overrides, console=self.study.console, **more)
        if outcome.interrupted:
            return None
        records = [one for one in read_metrics(run) if one["kind"] == "train"]
        first, last = records[0], records[-1]
        seconds = last["seconds"] - first["seconds"]
        return {"images_per_second": (last["images"] - first["images"]) / seconds, "skipped": last["skipped"]}


class Stopwatch(TrainerCallback):
    """Seconds of Trainer's steps but the first ones."""

    def __init__(self, first: int) -> None:
        self.first, self.seconds, self._steps, self._since = first, 0.0, 0, 0.0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Starts behind the first steps; gives the seconds since then."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._steps += 1
        now = time.perf_counter()
        if self._steps == self.first:
            self._since = now
        self.seconds = now - self._since


def conduct(study: Study) -> bool:
    """Does the runs that are not finished, writes what is; False where it was stopped."""
    profile = Profile.checked(study.read_profile(), where=study.profile)
    data = study.datasets(profile.datasets) if profile.datasets else licensed_datasets(study, every_licensed())
    benches = [Bench(name, asked, study, profile, data) for name, asked in profile.detectors.items()]
    runs = [run for bench in benches for run in bench.runs]
    done = runner.run_all(study, runs)
    found = runner.reports(runs)
    if found:
        result = {
            **runner.circumstances("adopted-speed", report.all_commits(found), benches[0].recipe.train.loop.device),
            "transformers": transformers.__version__,
            "profile": study.profile,
            "complete": done,
            "settings": profile.model_dump(mode="json") | {"set": list(study.overrides)},
            "runs": found,
        }
        report.write_result(study.stem, result, page(result))
    return done


def page(result: Mapping[str, Any]) -> str:
    """The page of a result: a row for each detector with both trainings."""
    runs = {(one["detector"], one["arm"]): one for one in result["runs"]}
    rows = []
    for detector in dict.fromkeys(name for name, _ in runs):
        theirs, ours = (runs.get((detector, arm)) for arm in ARMS)
        speeds = [None if one is None else one["images_per_second"] for one in (theirs, ours)]
        ratio = speeds[1] / speeds[0] if speeds[0] and speeds[1] else None
        memory = [report.number(None if one is None else one["memory_gib"]) for one in (theirs, ours)]
        names = str(next(one["names"] for one in (theirs, ours) if one is not None))
        rows.append([detector, names, *map(report.number, speeds), report.number(ratio, ".2f"), *memory])
    head = ["detector", "names", "images/s, Trainer", "images/s, METR", "METR / Trainer", "GiB, Trainer", "GiB, METR"]
    return report.joined(
        "# Training of adopted detectors: speed",
        f"{report.profile_of(result)}, on {report.facts(result)}, transformers {result['transformers']}.",
        report.table(head, rows),
        report.runs_by_commit((f"{one['detector']}, {one['arm']}", one["commit"]) for one in result["runs"]),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the study; see `runner.exit_status`."""
    parser = runner.option_parser(__doc__, ("trial", "gpu", "tiny"))
    study, _ = runner.parse_study(parser, "adopted-speed", arguments)
    return runner.exit_status(lambda: conduct(study))


if __name__ == "__main__":
    sys.exit(main())
