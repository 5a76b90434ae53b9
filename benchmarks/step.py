"""How long does METR-base take for a training step and for inference, against transformers' Deformable DETR?

    python benchmarks/step.py

Both have the same backbone (random weights, frozen batch norms, all else learns), width, layers, heads, points, levels,
feed-forward parts, queries, images and objects, two stages, box refinement, a loss after every decoder layer, fused
AdamW, no dropout; nothing is compiled, neither needs a built kernel. METR's denoising and EMA are off. A training step
is forward, matching, losses, backward and optimizer; inference is the network without post-processing.

The contenders take turns, so that whatever else the machine does hits all of them. Times are medians; a ratio is the
median of the rounds' ratios. A further table says where METR's time goes, and what denoising would add to the fastest
step.

One thread of an AMD EPYC, ResNet-50, 640 x 640, 300 queries (results/step-cpu.json): a training step takes 0.58 of
Deformable DETR's time, inference 0.63; matching is less than 0.1 % of the step.

Results: `results/step-DEVICE.json` and `.md`.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import track
from torch import nn, optim
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

import report
import runner
from metr.config import Tree
from metr.devices import autocast
from metr.errors import ConfigError
from metr.losses.criterion import SetCriterion
from metr.losses.predictions import query_predictions
from metr.models.detector import Detector
from metr.structures import Targets
from metr.training.config import load_recipe
from noise_objects import objects

RATIO_BAR, MATCHING_BAR = 1.25, 0.05
METR, REFERENCE, DENOISING = "METR", "Deformable DETR", "METR with denoising"
# parts of the forward pass that are modules of their own; what is left of it is selection, proposals and queries
MODULES, REST = ("backbone", "encoder", "category_extraction", "decoder"), "selection_and_proposals"
TEXT_WIDTH = 512


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command line says."""

    size: int = 640  # pixels a side
    batch: int = 1
    repeats: int = 5  # counted rounds; one more warms up
    names: int = 80
    queries: int = 300
    objects: int = 15  # an image, on average
    denoising: int = 100  # queries, in the further measurement
    backbone: str = "resnet50"
    layers: int = 6  # of encoder and decoder each
    feed_forward: int = 1024
    threads: int = 0  # 0: as many as torch likes
    device: str = "auto"
    precision: str = "fp32"

    @property
    def torch_device(self) -> torch.device:
        """The device, `auto` resolved."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("torch finds no CUDA device", where="--device", hint="--device cpu")
        return torch.device(self.device)


class Contender:
    """A detector with its optimizer, and the batch that all contenders see: noise, and a natural image's objects."""

    def __init__(self, settings: Settings, network: nn.Module) -> None:
        self.settings, self.device = settings, settings.torch_device
        random = torch.Generator().manual_seed(0)
        self.images = torch.rand(settings.batch, 3, settings.size, settings.size, generator=random).to(self.device)
        text = nn.functional.normalize(torch.randn(settings.names, TEXT_WIDTH, generator=random), dim=-1)
        self.text = text.to(self.device)
        self.targets = Targets.stack(
            [objects(settings.objects, settings.names, random) for _ in range(settings.batch)]
        ).to(self.device)
        self.mask = torch.zeros(len(self.images), *self.images.shape[2:], dtype=torch.bool, device=self.device)
        self.network = network.to(self.device)
        self.optimizer = optim.AdamW(self.network.parameters(), lr=1e-6, fused=True)


class Metr(Contender):
    """METR-base with random weights, as large as the settings say."""

    def __init__(self, settings: Settings, denoising: int = 0) -> None:
        layers: Tree = {"layers": settings.layers, "feed_forward": settings.feed_forward}
        model = {
            "backbone": {"name": settings.backbone, "pretrained": False, "freeze_stages": 0},
            "encoder": layers,
            "decoder": layers,
            "queries": {"number": settings.queries, "ceiling": settings.queries},
            "denoising": {"number": denoising},
        }
        recipe = load_recipe("base", changes={"model": model})
        self.criterion = SetCriterion(recipe.criterion)
        self.detector = Detector(recipe.model, TEXT_WIDTH)
        super().__init__(settings, self.detector)

    def infer(self) -> None:
        """Forward, without targets."""
        with autocast(self.settings.precision, self.device):
            self.network(self.images, self.mask, self.text)

    def train_step(self, reached: Callable[[str], object] = lambda _: None) -> None:
        """A training step that says which part it has just finished."""
        with autocast(self.settings.precision, self.device):
            output = self.network(self.images, self.mask, self.text, self.targets)
        reached("forward")
        predictions = query_predictions(output)
        matches = self.criterion.match(predictions, self.targets)
        reached("matching")
        loss = self.criterion.losses(output, predictions.matched(matches), self.targets).total
        reached("losses")
        loss.backward()  # type: ignore[no-untyped-call]
        reached("backward")
        self.optimizer.step()
        self.optimizer.zero_grad()
        reached("optimizer")


class Reference(Contender):
    """Transformers' Deformable DETR, equal to METR-base where the two have the same parts."""

    def __init__(self, settings: Settings, metr: Detector) -> None:
        build: Any = DeformableDetrConfig
        backbone: Any = metr.backbone
        config = metr.config
        same = build(
            num_labels=settings.names,
            backbone_config=deepcopy(backbone.network.config),
            num_queries=settings.queries,
            two_stage_num_proposals=settings.queries,
            d_model=config.width,
            encoder_layers=config.encoder.layers,
            encoder_attention_heads=config.encoder.heads,
            encoder_n_points=config.encoder.points,
            encoder_ffn_dim=config.encoder.feed_forward,
            num_feature_levels=config.encoder.levels,
            decoder_layers=config.decoder.layers,
            decoder_attention_heads=config.decoder.heads,
            decoder_n_points=config.decoder.points,
            decoder_ffn_dim=config.decoder.feed_forward,
            two_stage=True,
            with_box_refine=True,
            auxiliary_loss=True,
            dropout=0.0,
            disable_custom_kernels=True,
        )
        network: Any = DeformableDetrForObjectDetection(same)
        super().__init__(settings, network.requires_grad_(True))
        self.pixel_mask = (~self.mask).long()
        self.labels = [
            {"class_labels": labels[here], "boxes": boxes[here]}
            for labels, boxes, here in zip(self.targets.labels, self.targets.boxes, self.targets.is_object, strict=True)
        ]

    def infer(self) -> None:
        """Forward, without targets."""
        with autocast(self.settings.precision, self.device):
            self.network(self.images, self.pixel_mask)

    def train_step(self) -> None:
        """Forward, matching, losses, backward, optimizer."""
        with autocast(self.settings.precision, self.device):
            output = self.network(self.images, self.pixel_mask, labels=self.labels)
        output.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def now(device: torch.device) -> float:
    """Seconds since some moment, with the device's queue empty."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
    return time.perf_counter()


def take_turns(actions: Mapping[str, Callable[[], None]], settings: Settings, what: str) -> dict[str, list[float]]:
    """Seconds of every contender's action in every counted round; who begins changes from round to round."""
    names, seconds = list(actions), {name: [0.0] * (settings.repeats + 1) for name in actions}
    for turn in track(range(settings.repeats + 1), what, console=Console(stderr=True)):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            began = now(settings.torch_device)
            actions[name]()
            seconds[name][turn] = now(settings.torch_device) - began
    return {name: values[1:] for name, values in seconds.items()}


def step_parts(metr: Metr) -> dict[str, float]:
    """Seconds of each part of a training step; hooks say when modules began and ended, and when gradients came back."""
    seconds, returned = dict.fromkeys((*MODULES, REST), 0.0), list[float]()
    began: dict[str, float] = {}

    def after(name: str, output: Any) -> None:
        seconds[name] = now(metr.device) - began[name]
        if name in ("encoder", "backbone"):
            result = output.tokens if name == "encoder" else output[-1]
            result.register_hook(lambda _: returned.append(now(metr.device)))

    handles = []
    for name in MODULES:
        module = metr.network.get_submodule(name)
        before = module.register_forward_pre_hook(lambda *_, name=name: began.update({name: now(metr.device)}))
        handles += [before, module.register_forward_hook(lambda *io, name=name: after(name, io[-1]))]
    marks = {"begin": now(metr.device)}
    metr.train_step(lambda part: marks.update({part: now(metr.device)}))
    for handle in handles:
        handle.remove()
    laps = {part: marks[part] - marks[earlier] for earlier, part in pairwise(marks)}
    seconds[REST] = laps["forward"] - sum(seconds.values())
    activation_statistics = [marks["losses"], *returned, marks["backward"]]
    backward = ("backward_of_queries_and_categories", "backward_of_encoder", "backward_of_backbone")
    gradients = {
        part: end - start for part, (start, end) in zip(backward, pairwise(activation_statistics), strict=True)
    }
    losses = {part: laps[part] for part in ("matching", "losses")}
    return {**seconds, **losses, **gradients, "optimizer": laps["optimizer"]}


def measure(settings: Settings) -> Tree:
    """The result as the JSON file has it."""
    torch.manual_seed(0)
    metr, denoising = Metr(settings), Metr(settings, settings.denoising)
    reference = Reference(settings, metr.detector)
    for contender in (metr, reference, denoising):
        contender.network.train()
    steps = {METR: metr.train_step, REFERENCE: reference.train_step}
    rounds = {"training": take_turns(steps, settings, "training steps")}
    pair = {METR: metr.train_step, DENOISING: denoising.train_step}
    rounds["denoising"] = take_turns(pair, settings, "training steps with denoising")
    each = [step_parts(metr) for _ in range(settings.repeats + 1)][1:]
    parts = {part: median(one[part] for one in each) for part in each[0]}
    for contender in (metr, reference):
        contender.network.eval()
    with torch.inference_mode():
        rounds["inference"] = take_turns({METR: metr.infer, REFERENCE: reference.infer}, settings, "inference")
    ratios = {
        f"{what}_ratio": median(a / b for a, b in zip(rounds[what][METR], rounds[what][REFERENCE], strict=True))
        for what in ("training", "inference")
    }
    step = sum(parts.values())
    bars = {name: report.bar(value, RATIO_BAR) for name, value in ratios.items()}
    # the fastest steps: what denoising adds is less than what a busy machine does to a median
    added = min(rounds["denoising"][DENOISING]) / min(rounds["denoising"][METR]) - 1
    return {
        **runner.circumstances("step", runner.commit(), settings.device),
        "transformers": transformers.__version__,
        "settings": asdict(settings),
        "bars": bars | {"matching_share": report.bar(parts["matching"] / step, MATCHING_BAR)},
        "seconds": {what: {name: median(values) for name, values in turns.items()} for what, turns in rounds.items()},
        "denoising": {"queries": settings.denoising, "added_share_of_a_step": added},
        "parts": {part: {"seconds": value, "share": value / step} for part, value in parts.items()},
        "rounds": rounds,
    }


def page(result: Mapping[str, Any]) -> str:
    """The page of a result: the contenders side by side, and the parts of METR's step."""
    bars, denoising, rows = result["bars"], result["denoising"], []
    for what in ("training", "inference"):
        seconds, ratio = result["seconds"][what], bars[f"{what}_ratio"]
        times = [f"{seconds[name]:.3f}" for name in (METR, REFERENCE)]
        rows.append([what, *times, f"{ratio['value']:.2f}", report.bar_text(ratio)])
    parts = [
        [part.replace("_", " "), f"{one['seconds']:.3f}", f"{one['share']:.1%}"]
        for part, one in result["parts"].items()
    ]
    return report.joined(
        f"# A training step: seconds a batch on {report.facts(result)}, transformers {result['transformers']}",
        report.table(["", METR, REFERENCE, "ratio", "bar"], rows),
        report.table(["part of METR's training step", "seconds", "share"], parts),
        f"Matching: {bars['matching_share']['value']:.2%} of a step ({report.bar_text(bars['matching_share'])}).",
        f"{denoising['queries']} denoising queries add {denoising['added_share_of_a_step']:.1%} to a step.",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and writes; see `runner.exit_status`."""
    parser = runner.option_parser(__doc__)
    choices = {"device": ("auto", "cpu", "cuda"), "precision": ("fp32", "bf16")}
    for name, value in asdict(Settings()).items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(value), default=value, choices=choices.get(name), help=f"default {value}")
    given = vars(parser.parse_args(arguments))
    results: Path = given.pop("results")

    def work() -> bool:
        settings = Settings(**given)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        device = settings.torch_device
        name = "cpu" if device.type == "cpu" else runner.hardware(device).lower().replace(" ", "-")
        result = measure(settings)
        report.write_result(results / f"step-{name}", result, page(result))
        return True

    return runner.exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
