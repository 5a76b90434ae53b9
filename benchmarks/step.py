"""Step: how long METR-base takes for a training step and for inference, against transformers' Deformable DETR.

    python benchmarks/step.py

Both have the same backbone (random weights, frozen batch norms, all else learns), width, layers, heads, points, levels,
feed-forward parts, queries, images and objects, two stages, box refinement, a loss after every decoder layer, fused
AdamW, no dropout; nothing is compiled, neither needs a built kernel. METR's denoising and EMA are off. A training step
is forward, matching, losses, backward and optimizer; inference is the network without post-processing.

The contenders take turns, so that whatever else the machine does hits all of them. Times are medians; a ratio is the
median of the rounds' ratios. A further table says where METR's time goes, and what denoising would add to the fastest
step. The result is written to `results/step-DEVICE.json` beside this file.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from machine import commit, hardware
from metr.errors import MetrError
from step_contenders import Contender, Metr, Reference, Scene, Settings

RATIO_BAR, MATCHING_BAR = 1.25, 0.05
METR, REFERENCE, DENOISING = "METR", "Deformable DETR", "METR with denoising"
# Parts of the forward pass that are modules of their own; what is left of it is selection, proposals and queries.
MODULES = ("backbone", "encoder", "category_extraction", "decoder")
REST = "selection_and_proposals"


class Clock:
    """Seconds between calls, with the device's queue empty at each."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.last = self.now()

    def now(self) -> float:
        """Seconds since some moment."""
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize(self.device)
        return time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap, or since the clock was made."""
        before, self.last = self.last, self.now()
        return self.last - before


def take_turns(actions: dict[str, Callable[[], None]], settings: Settings, what: str) -> dict[str, list[float]]:
    """Seconds of every contender's action in every counted round; who begins changes from round to round."""
    names, seconds = list(actions), {name: [0.0] * (settings.repeats + 1) for name in actions}
    for turn in track(range(settings.repeats + 1), what, console=Console(stderr=True)):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            clock = Clock(settings.torch_device)
            actions[name]()
            seconds[name][turn] = clock.lap()
    return {name: values[1:] for name, values in seconds.items()}


def time_parts(contender: Metr, repeats: int) -> dict[str, float]:
    """Median seconds of each part of METR's training step, in the order in which they run."""
    steps = [_step_parts(contender) for _ in range(repeats + 1)][1:]
    return {part: median(step[part] for step in steps) for part in steps[0]}


def _step_parts(contender: Metr) -> dict[str, float]:
    """One training step. Hooks say when each module began and ended, and when gradients came back to it."""
    clock, seconds, returned = Clock(contender.device), dict.fromkeys((*MODULES, REST), 0.0), []
    began: dict[str, float] = {}

    def before(name: str) -> Callable[..., None]:
        return lambda *_: began.update({name: clock.now()})

    def after(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, output: Any) -> None:
            seconds[name] = clock.now() - began[name]
            if name in ("encoder", "backbone"):
                result = output.tokens if name == "encoder" else output[-1]
                result.register_hook(lambda _: returned.append(clock.now()))

        return hook

    modules = {name: contender.network.get_submodule(name) for name in MODULES}
    handles = [module.register_forward_pre_hook(before(name)) for name, module in modules.items()]
    handles += [module.register_forward_hook(after(name)) for name, module in modules.items()]
    marks = {"begin": clock.now()}
    contender.train_step_in_parts(lambda part: marks.update({part: clock.now()}))
    for handle in handles:
        handle.remove()

    laps = {part: marks[part] - marks[earlier] for earlier, part in pairwise(marks)}
    seconds[REST] = laps.pop("forward") - sum(seconds.values())
    activation_statistics = [marks["losses"], *returned, marks["backward"]]
    backward = ("backward_of_queries_and_categories", "backward_of_encoder", "backward_of_backbone")
    del laps["backward"]
    seconds |= {"matching": laps.pop("matching"), "losses": laps.pop("losses")}
    seconds |= {part: end - start for part, (start, end) in zip(backward, pairwise(activation_statistics), strict=True)}
    return seconds | laps


def measure(settings: Settings) -> dict[str, Any]:
    """The whole benchmark, as written to the file."""
    torch.manual_seed(0)
    scene = Scene.of(settings)
    metr, denoising = Metr(settings, scene), Metr(settings, scene, settings.denoising)
    contenders: dict[str, Contender] = {METR: metr, REFERENCE: Reference(settings, scene, metr.network)}
    for contender in (*contenders.values(), denoising):
        contender.network.train()
    steps = {name: contender.train_step for name, contender in contenders.items()}
    training = take_turns(steps, settings, "training steps")
    pair = {METR: metr.train_step, DENOISING: denoising.train_step}
    alternating = take_turns(pair, settings, "training steps with denoising")
    parts = time_parts(metr, settings.repeats)
    for contender in contenders.values():
        contender.network.eval()
    with torch.inference_mode():
        forwards = {name: contender.infer for name, contender in contenders.items()}
        inference = take_turns(forwards, settings, "inference")
    rounds = {"training": training, "denoising": alternating, "inference": inference}
    return _facts(settings) | _result(settings, rounds, parts)


def _facts(settings: Settings) -> dict[str, Any]:
    return {
        "benchmark": "step",
        "hardware": hardware(settings.torch_device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
        "settings": {name: value for name, value in asdict(settings).items() if name != "results"},
    }


def _result(settings: Settings, rounds: dict[str, dict[str, list[float]]], parts: dict[str, float]) -> dict[str, Any]:
    step = sum(parts.values())
    matching = parts["matching"] / step
    # The fastest steps: what denoising adds is less than what a busy machine does to a median.
    added = min(rounds["denoising"][DENOISING]) / min(rounds["denoising"][METR]) - 1
    ratios = {f"{what}_ratio": _ratio(rounds[what], METR, REFERENCE) for what in ("training", "inference")}
    bars = {name: (value, RATIO_BAR) for name, value in ratios.items()} | {"matching_share": (matching, MATCHING_BAR)}
    return {
        "bars": {name: {"value": value, "bar": bar, "met": value <= bar} for name, (value, bar) in bars.items()},
        "seconds": {what: {name: median(values) for name, values in turns.items()} for what, turns in rounds.items()},
        "denoising": {"queries": settings.denoising, "added_share_of_a_step": added},
        "parts": {part: {"seconds": value, "share": value / step} for part, value in parts.items()},
        "rounds": rounds,
    }


def _ratio(seconds: dict[str, list[float]], one: str, other: str) -> float:
    return median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))


def show(result: dict[str, Any], console: Console) -> None:
    """The result as tables."""
    bars = result["bars"]
    table = Table("", METR, REFERENCE, "ratio", "bar", title=f"Seconds a batch on {result['hardware']}")
    for what in ("training", "inference"):
        seconds, ratio = result["seconds"][what], bars[f"{what}_ratio"]
        cells = (f"{seconds[name]:.3f}" for name in (METR, REFERENCE))
        table.add_row(what, *cells, f"{ratio['value']:.2f}", _judged(ratio))
    console.print(table)
    table = Table("part of METR's training step", "seconds", "share", "bar")
    for part, facts in result["parts"].items():
        bar = _judged(bars["matching_share"]) if part == "matching" else ""
        table.add_row(part.replace("_", " "), f"{facts['seconds']:.3f}", f"{facts['share']:.1%}", bar)
    console.print(table)
    denoising = result["denoising"]
    console.print(f"{denoising['queries']} denoising queries add {denoising['added_share_of_a_step']:.1%} to a step")


def _judged(bar: dict[str, Any]) -> str:
    return f"at most {bar['bar']:g}: {'met' if bar['met'] else '[red]missed[/]'}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; the exit status is 0, or 1 with one message where something is missing."""
    console = Console()
    try:
        settings = _settings(arguments)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        result = measure(settings)
    except MetrError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 1
    show(result, console)
    settings.results.mkdir(parents=True, exist_ok=True)
    device = settings.torch_device
    name = "cpu" if device.type == "cpu" else hardware(device).lower().replace(" ", "-")
    path = settings.results / f"step-{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    console.print(f"written: {path}", markup=False)
    return 0


def _settings(arguments: Sequence[str] | None) -> Settings:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = {"device": ("auto", "cpu", "cuda"), "precision": ("fp32", "bf16")}
    for name, value in asdict(Settings()).items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(value), default=value, choices=choices.get(name), help=f"default {value}")
    # a Path's own type is that of the system
    given = vars(parser.parse_args(arguments))
    return Settings(**given | {"results": Path(given["results"])})


if __name__ == "__main__":
    sys.exit(main())
