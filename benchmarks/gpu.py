"""What half an hour of one GPU says about METR: speed beside other detectors, the kernel, waits, loading, MultiField.

    python benchmarks/gpu.py --data FOLDER           # all pieces, each under ten minutes
    python benchmarks/gpu.py --pieces speed kernel   # some of them
    python benchmarks/gpu.py --tiny                  # seconds, on a CPU: does it run?

- `speed`: a training step and inference of METR-base, and of transformers' Deformable DETR and RT-DETR with the same
  backbone, plain and compiled: images a second, peak memory, FLOPs and bytes beside what the chip can do. Bytes are
  those of the inputs and outputs of every operation, which is more than a fused or cached program moves; FLOPs leave
  out deformable sampling.
- `kernel`: the Triton kernel of deformable sampling against the plain way: errors by precision, and times.
- `training`: METR trains on MultiField (`--data`) for some steps: how long a step waits for images, and where the host
  waits for the device.
- `multifield`: the profile `multifield-gpu` of benchmarks/profiles for as many steps as fit, then its evaluation.

A piece that fails is reported with its error, and the others go on. Results: `results/gpu-PIECE-DEVICE.json`, with
hardware, commit and settings.
"""

import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import report
import runner
import step
from metr.config import Tree
from metr.devices import autocast, peak_memory
from metr.layers import deformable_attention as sampling
from metr.models.detector import compile_parts
from metr.training.config import load_recipe
from metr.training.logger import read_metrics
from metr.training.train import train

PIECES = ("speed", "kernel", "training", "multifield")
CHIPS = {
    "H100": {"bf16_tflops": 989.4, "fp32_tflops": 66.9, "gb_per_second": 3350},
    "H200": {"bf16_tflops": 989.4, "fp32_tflops": 66.9, "gb_per_second": 4800},
    "A100": {"bf16_tflops": 312.0, "fp32_tflops": 19.5, "gb_per_second": 2039},
    "RTX 4090": {"bf16_tflops": 165.2, "fp32_tflops": 82.6, "gb_per_second": 1008},
}
"""Peak figures of chips by a part of their name: dense matrix products in bf16, float32 without tensor cores, and the
memory. From NVIDIA's data sheets of the H100 SXM5 80GB, the H200 SXM and the A100 SXM4 80GB, and from its Ada GPU
architecture whitepaper; figures "with sparsity" are halved."""
SIZES = {"speed": {}, "tiny": {"size": 64, "batch": 1, "repeats": 1, "names": 8, "queries": 20, "objects": 3,
         "backbone": "resnet18", "layers": 1, "feed_forward": 32}}  # fmt: skip


class RtDetr(step.Contender):
    """Transformers' RT-DETR with its own encoder, the same backbone, decoder layers, width and queries."""

    def __init__(self, settings: step.Settings, metr: step.Metr) -> None:
        config, backbone = metr.detector.config, metr.detector.backbone
        made: Any = backbone
        build: Any = transformers.RTDetrConfig
        same = build(
            num_labels=settings.names,
            backbone_config=made.network.config,
            encoder_in_channels=list(backbone.channels),
            num_queries=settings.queries,
            d_model=config.width,
            encoder_hidden_dim=config.width,
            decoder_in_channels=[config.width] * 3,
            decoder_layers=config.decoder.layers,
            decoder_ffn_dim=config.decoder.feed_forward,
            encoder_ffn_dim=config.decoder.feed_forward,
            num_denoising=0,
            freeze_backbone_batch_norms=True,
            disable_custom_kernels=True,
        )
        network: Any = transformers.RTDetrForObjectDetection(same)
        super().__init__(settings, network.requires_grad_(True))
        rows = zip(self.targets.labels, self.targets.boxes, self.targets.is_object, strict=True)
        self.labels = [{"class_labels": labels[here], "boxes": boxes[here]} for labels, boxes, here in rows]

    def infer(self) -> None:
        """Forward, without targets."""
        with autocast(self.settings.precision, self.device):
            self.network(self.images)

    def train_step(self) -> None:
        """Forward, matching, losses, backward, optimizer."""
        with autocast(self.settings.precision, self.device):
            output = self.network(self.images, labels=self.labels)
        output.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes of the inputs and outputs of every operation but views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one operation."""
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            touched = torch.utils._pytree.tree_leaves((args, kwargs, out))
            self.bytes += sum(one.nbytes for one in touched if isinstance(one, Tensor))
        return out


def speed(settings: step.Settings) -> Tree:
    """Every contender's training step and inference, plain and compiled."""
    metr = step.Metr(settings)
    makers: dict[str, Callable[[], Any]] = {
        step.METR: lambda: step.Metr(settings),
        step.REFERENCE: lambda: step.Reference(settings, metr.detector),
        "RT-DETR": lambda: RtDetr(settings, metr),
    }
    found: Tree = {}
    for name, make in makers.items():
        for compiled in (False, True):
            if compiled and settings.torch_device.type == "cpu":
                continue  # it would need a C++ compiler
            key = f"{name}, compiled" if compiled else name
            found[key] = attempted(partial(speed_of, make, compiled))
    return {"contenders": found, "chip": chip(settings.torch_device)}


def speed_of(make: Callable[[], Any], compiled: bool) -> Tree:
    """Seconds, memory and work of the contender that `make` builds."""
    contender = make()
    settings, device, found = contender.settings, contender.device, {}
    network = contender.network
    actions: dict[str, Callable[[], None]] = {"training": contender.train_step, "inference": contender.infer}
    work = {} if compiled else {what: counted_work(network, what, action) for what, action in actions.items()}
    if compiled and isinstance(contender, step.Metr):
        compile_parts(contender.detector)
    elif compiled:
        network.compile()
    for what, action in actions.items():
        network.train(what == "training")
        with torch.set_grad_enabled(what == "training"):
            for _ in range(1 if settings.repeats == 1 else 3):
                action()
            fresh_peak(device)
            seconds = [timed(action, device) for _ in range(settings.repeats)]
        each = median(seconds)
        found[what] = {"seconds": each, "images_per_second": settings.batch / each, "memory_gib": peak_memory(device)}
        if what in work:
            found[what] |= roofline(work[what], each, settings.precision, chip(device))
    return found


def counted_work(network: Any, what: str, action: Callable[[], None]) -> dict[str, float]:
    """FLOPs and bytes of an action."""
    network.train(what == "training")
    with torch.set_grad_enabled(what == "training"):
        with FlopCounterMode(display=False) as flops:
            action()
        with Traffic() as traffic:
            action()
    return {"flops": float(flops.get_total_flops()), "bytes": float(traffic.bytes)}


def roofline(work: dict[str, float], seconds: float, precision: str, limits: Tree | None) -> Tree:
    """The work, and the shares of the chip's limits that it reaches; the shares are null for an unknown chip."""
    if limits is None:
        return {**work, "share_of_peak_flops": None, "share_of_peak_bandwidth": None}
    peak = float(limits[f"{precision}_tflops"]) * 1e12
    return {
        **work,
        "share_of_peak_flops": work["flops"] / seconds / peak,
        "share_of_peak_bandwidth": work["bytes"] / seconds / (float(limits["gb_per_second"]) * 1e9),
    }


def chip(device: torch.device) -> Tree | None:
    """The peak figures of the device; None where they are not known."""
    name = runner.hardware(device)
    return next(({"name": part, **figures} for part, figures in CHIPS.items() if part in name), None)


def kernel(settings: step.Settings) -> Tree:
    """Errors of the Triton kernel by precision, and its times beside the plain way's, as in METR's encoder."""
    device = settings.torch_device
    on_gpu = device.type == "cuda"
    precisions = (torch.float32, torch.bfloat16, torch.float16) if on_gpu else ()
    errors = {str(one).removeprefix("torch."): sampling.kernel_error(device, one) for one in precisions}
    shapes = tuple((settings.size // stride, settings.size // stride) for stride in (8, 16, 32, 64))
    tokens, heads, points, width = sum(h * w for h, w in shapes), 8, 4, 256
    value = torch.randn(settings.batch, tokens, width, device=device)
    value = value.to(torch.bfloat16 if settings.precision == "bf16" else torch.float32)
    places = torch.rand(settings.batch, tokens, heads, len(shapes), points, 2, device=device)
    weights = torch.rand(settings.batch, tokens, heads, len(shapes), points, device=device)
    ways: dict[str, Callable[..., Tensor]] = {"plain": plain_sampling}
    if on_gpu:
        ways["kernel"] = sampling.sample_fused
    times = {}
    for name, sample in ways.items():

        def both(sample: Callable[..., Tensor] = sample) -> None:
            leaves = [one.detach().requires_grad_() for one in (value, places, weights)]
            sample(*leaves, shapes).sum().backward()  # type: ignore[no-untyped-call]

        for _ in range(2):
            both()
        fresh_peak(device)
        times[name] = {"seconds": median(timed(both, device) for _ in range(settings.repeats))}
        times[name]["memory_gib"] = peak_memory(device)
    used = sampling.kernel_is_used() if on_gpu else False
    return {"errors": errors, "forward_and_backward": times, "tokens": tokens, "used": used}


def plain_sampling(value: Tensor, places: Tensor, weights: Tensor, shapes: sampling.LevelShapes) -> Tensor:
    """What `sample_levels` does without the kernel."""
    return sampling.sample_grids(value.to(places.dtype), places, weights, shapes).to(value.dtype)


def training(settings: step.Settings, data: Sequence[str], overrides: Sequence[str], steps: int) -> Tree:
    """Trains for some steps: share of waiting for images, images a second, waits for the device by place."""
    profile = None if settings.repeats == 1 else runner.HERE / "profiles" / "multifield-gpu.yaml"
    loop = [f"train.loop.steps={steps}", f"train.loop.log_every={max(1, steps // 4)}", "train.loop.evaluate_every=0"]
    recipe = load_recipe("nano", profile, [*loop, "train.loop.images=false", "train.loop.curves=false", *overrides])
    with TemporaryDirectory() as folder, waits_by_place(settings.torch_device) as waits:
        train(data, Path(folder) / "run", recipe)
        records = [record for record in read_metrics(Path(folder) / "run") if record["kind"] == "train"]
    steps = recipe.train.loop.steps
    last = {key: records[-1][key] for key in ("images_per_second", "waiting_fraction", "memory_gib", "skipped")}
    return {"steps": steps, **last, "waits": dict(waits), "waits_per_step": waits.total() / steps}


@contextmanager
def waits_by_place(device: torch.device) -> Iterator[Counter[str]]:
    """Counts where the host waits for a GPU, by line of code; elsewhere nothing."""
    counted: Counter[str] = Counter()
    if device.type != "cuda":
        yield counted
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield counted
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one in caught:
        if "synchroniz" in str(one.message):
            counted[re.sub(r"^.*/(?=metr/|torch/)", "", f"{one.filename}:{one.lineno}")] += 1


def multifield(data: Sequence[str], overrides: Sequence[str], steps: int, out: Path) -> Tree:
    """The GPU profile of MultiField for some steps, and the evaluation at its end."""
    profile = runner.HERE / "profiles" / "multifield-gpu.yaml"
    loop = [f"train.loop.steps={steps}", "train.loop.evaluate_every=0"]
    recipe = load_recipe("nano", profile, [*loop, *overrides])
    began = time.perf_counter()
    outcome = train(data, out, recipe)
    seconds = time.perf_counter() - began
    return {"steps": outcome.step, "seconds": seconds, "metrics": dict(outcome.metrics), **runner.training_cost(out)}


def fresh_peak(device: torch.device) -> None:
    """Forgets the device's peak memory so far."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def timed(action: Callable[[], object], device: torch.device) -> float:
    """Seconds that an action takes, with the device's queue empty before and after."""
    began = step.now(device)
    action()
    return step.now(device) - began


def attempted(work: Callable[[], Tree]) -> Tree:
    """What the work finds, or its error: a GPU's time is too dear to lose the other pieces."""
    try:
        return work()
    except Exception as error:  # whatever it is, it is reported
        return {"error": f"{type(error).__name__}: {error}"[:2000]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and writes; see `runner.exit_status`."""
    parser = runner.option_parser(__doc__)
    parser.add_argument("--pieces", nargs="+", choices=PIECES, default=list(PIECES), metavar="PIECE")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes, for a try on a CPU")
    parser.add_argument("--data", nargs="*", default=[], metavar="NAME=FOLDER", help="what to train on")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=0, help="of the pieces that train; 0: 60 and 1500, tiny 4")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="for the training")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    given = parser.parse_args(arguments)

    def work() -> bool:
        settings = step.Settings(batch=given.batch, repeats=20, precision="bf16", device=given.device)
        if given.tiny:
            settings = replace(settings, **dict[str, Any](SIZES["tiny"]), precision="fp32")
        device = settings.torch_device
        where = "cpu" if device.type == "cpu" else runner.hardware(device).lower().replace(" ", "-")
        few, many = (4, 4) if given.tiny else (60, 1500)
        out = Path("runs") / f"gpu-multifield-{where}"
        pieces: dict[str, Callable[[], Tree]] = {
            "speed": lambda: speed(settings),
            "kernel": lambda: kernel(settings),
            "training": lambda: training(settings, given.data, given.set, given.steps or few),
            "multifield": lambda: multifield(given.data, given.set, given.steps or many, out),
        }
        complete = True
        for piece in given.pieces:
            if piece in ("training", "multifield") and not given.data:
                continue
            began = time.perf_counter()
            found = attempted(pieces[piece])
            facts = runner.circumstances(f"gpu-{piece}", runner.commit(), str(device))
            facts |= {"transformers": transformers.__version__, "settings": asdict(settings)}
            result = {**facts, "seconds": time.perf_counter() - began, "result": found}
            report.write_result(given.results / f"gpu-{piece}-{where}", result)
            complete = complete and "error" not in found
        return complete

    return runner.exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
