"""Does a training step take less time than in another checkout of METR? Both take turns, in processes of their own.

    git worktree add ../before COMMIT
    python benchmarks/step_pair.py --against ../before

A step is that of a run: forward, matching, losses, backward, clipping, AdamW, buffers and the average of the weights,
of a recipe with random weights, on noise with a natural image's objects. Both begin with the same weights and see the
same batch, so their losses agree as far as their arithmetic does. Times are processor seconds; a ratio is the median of
the rounds' ratios, and who begins changes from round to round, so that whatever else the machine does hits both.

Results: `results/step-pair-cpu.json` and `.md`, `step-pair-RECIPE-cpu` for another recipe than `nano`.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

import report
import runner
from metr.config import Tree
from metr.devices import autocast
from metr.errors import MetrError
from metr.losses.criterion import SetCriterion
from metr.losses.matcher import match_statistics
from metr.models.detector import Detector
from metr.structures import Targets
from metr.training.config import load_recipe
from metr.training.optimization import Ema, KeptBuffers, build_optimizer, step_if
from noise_objects import objects

BAR = 0.5
TEXT_WIDTH = 384
ROOT = Path(__file__).resolve().parents[1]
AFTER, BEFORE = "after", "before"
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command line says."""

    recipe: str = "nano"
    size: int = 256  # pixels a side
    batch: int = 8
    names: int = 30
    objects: int = 10  # an image, on average
    rounds: int = 9  # counted; one more warms up
    threads: int = 1
    precision: str = "fp32"
    before: str = "fp32"  # the precision of the other checkout
    pretrained: bool = False


class Contender:
    """A detector in training, and the one batch that it sees."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings.threads)
        torch.manual_seed(0)
        backbone = {"backbone": {"pretrained": settings.pretrained}}
        recipe = load_recipe(settings.recipe, changes={"model": backbone})
        self.network, self.limit = Detector(recipe.model, TEXT_WIDTH).train(), recipe.train.optimizer.clip_norm
        self.criterion = SetCriterion(recipe.criterion)
        self.optimizer = build_optimizer(self.network, recipe.train.optimizer)
        self.average, self.buffers = Ema(self.network, recipe.train.ema), KeptBuffers(self.network)
        random = torch.Generator().manual_seed(0)
        shape = settings.batch, 3, settings.size, settings.size
        self.images = torch.rand(shape, generator=random)
        self.mask = torch.zeros(settings.batch, settings.size, settings.size, dtype=torch.bool)
        text = torch.randn(settings.names, TEXT_WIDTH, generator=random)
        self.text = torch.nn.functional.normalize(text, dim=-1)
        shown = [objects(settings.objects, settings.names, random) for _ in range(settings.batch)]
        self.targets = Targets.stack(shown)
        self.precision = settings.precision
        self.steps = 0

    def step(self) -> Tree:
        """Makes a step: its processor seconds by part, and its loss before it."""
        marks = [time.process_time()]
        with autocast(self.precision, self.images.device):
            output = self.network(self.images, self.mask, self.text, self.targets)
        marks.append(time.process_time())
        losses, matches = self.criterion(output, self.targets)
        match_statistics(output, self.targets, matches)
        marks.append(time.process_time())
        losses.total.backward()
        marks.append(time.process_time())
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        finite = torch.nn.utils.clip_grad_norm_(weights, self.limit).isfinite()
        step_if(self.optimizer, finite)
        self.optimizer.zero_grad()
        self.buffers.keep_if(finite)
        self.steps += 1
        self.average.update(self.steps, finite)
        marks.append(time.process_time())
        parts = {name: marks[n + 1] - marks[n] for n, name in enumerate(PARTS)}
        loss = float(losses.total.detach())
        return {"seconds": marks[-1] - marks[0], "loss": loss, "parts": parts, "precision": self.precision}


PARTS = ("forward", "matching and losses", "backward", "optimizer and average")


class Worker:
    """A process that makes a step of one checkout whenever it is asked to."""

    def __init__(self, checkout: Path, settings: Settings) -> None:
        environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": str(settings.threads)}
        command = [sys.executable, __file__, "--worker", json.dumps(asdict(settings))]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def step(self) -> Tree:
        """The answer of a step.

        Raises:
            MetrError: the process is gone.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print("step", file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise MetrError("a contender ended early; what it says is above")
        answer: Tree = json.loads(line)
        return answer

    def end(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def work_on_demand(settings: Settings) -> int:
    """A contender's process: a line in, a step, a line out."""
    contender = Contender(settings)
    for _ in sys.stdin:
        print(json.dumps(contender.step()), flush=True)
    return 0


def measure(settings: Settings, against: Path) -> Tree:
    """The result as the JSON file has it."""
    other = replace(settings, precision=settings.before)
    workers = {AFTER: Worker(ROOT, settings), BEFORE: Worker(against.resolve(), other)}
    answers: dict[str, list[Tree]] = {AFTER: [], BEFORE: []}
    for turn in range(settings.rounds + 1):
        for name in (AFTER, BEFORE) if turn % 2 else (BEFORE, AFTER):
            answers[name].append(workers[name].step())
    for worker in workers.values():
        worker.end()
    counted = {name: several[1:] for name, several in answers.items()}
    seconds = {name: [one["seconds"] for one in several] for name, several in counted.items()}
    ratio = median(a / b for a, b in zip(seconds[AFTER], seconds[BEFORE], strict=True))
    losses = {name: [one["loss"] for one in several] for name, several in answers.items()}
    return {
        **runner.circumstances("step-pair", runner.commit(), "cpu"),
        "settings": asdict(settings),
        "bars": {"ratio": report.bar(ratio, BAR)},
        "seconds": {name: median(values) for name, values in seconds.items()},
        "parts": {
            part: {name: median(one["parts"][part] for one in several) for name, several in counted.items()}
            for part in PARTS
        },
        "precision": {name: several[0]["precision"] for name, several in counted.items()},
        "losses": losses,
        "rounds": seconds,
    }


def page(result: Mapping[str, Any]) -> str:
    """The page of a result: before and after, part by part, and how far apart the losses are."""
    seconds, ratio, losses = result["seconds"], result["bars"]["ratio"], result["losses"]
    rows = [[part, *(f"{values[name]:.3f}" for name in (BEFORE, AFTER))] for part, values in result["parts"].items()]
    rows.append(["a step", f"{seconds[BEFORE]:.3f}", f"{seconds[AFTER]:.3f}"])
    apart = max(abs(a / b - 1) for a, b in zip(losses[AFTER], losses[BEFORE], strict=True))
    return report.joined(
        f"# A training step before and after: processor seconds on {report.facts(result)}",
        report.table(["", *(f"{name}, {result['precision'][name]}" for name in (BEFORE, AFTER))], rows),
        f"Ratio of the steps, median of the rounds' ratios: {ratio['value']:.2f} ({report.bar_text(ratio)}).",
        f"The losses of {len(losses[AFTER])} steps differ by at most {apart:.1e} of their value.",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and writes; see `runner.exit_status`."""
    parser = runner.option_parser(__doc__)
    parser.add_argument("--worker", default="", help="of the processes that this one starts")
    parser.add_argument("--against", type=Path, default=ROOT, help="the other checkout; by default this one")
    for name, value in asdict(Settings()).items():
        flag, kind = f"--{name.replace('_', '-')}", type(value)
        told: dict[str, Any] = {"action": "store_true"} if kind is bool else {"type": kind, "default": value}
        if name in {"precision", "before"}:
            told["choices"] = PRECISIONS
        parser.add_argument(flag, help=f"default {value}", **told)
    given = vars(parser.parse_args(arguments))
    results, against, worker = given.pop("results"), given.pop("against"), given.pop("worker")
    if worker:
        return work_on_demand(Settings(**json.loads(worker)))

    def work() -> bool:
        result = measure(Settings(**given), against)
        recipe = "" if given["recipe"] == Settings.recipe else f"-{given['recipe']}"
        report.write_result(results / f"step-pair{recipe}-cpu", result, page(result))
        return True

    return runner.exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
