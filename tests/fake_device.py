"""Runs the detector and its losses on a device that is not there, and says where anything crossed between devices.

    python tests/fake_device.py CONFIGURATION.json

The file maps names to networks and losses ("model", "criterion"). Tensors are fake: they have shapes, types and a
device, but no values. The device "far" has no kernels either, only its name, so it takes a process of its own. An
operation that mixes devices is an error there as it is on a GPU. Printed is a JSON object: for each name the list of
faults.
"""

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from metr.losses.config import CriterionConfig
from metr.losses.criterion import SetCriterion
from metr.losses.matcher import match_statistics
from metr.losses.predictions import query_predictions
from metr.models.config import DetectorConfig
from metr.models.detector import Detector, skeleton
from metr.structures import Matches, Targets

FAR = "far:0"
TEXT_WIDTH, IMAGES, OBJECTS, NAMES = 24, 2, 5, 12


class Module(_DummyBackendModule):  # type: ignore[misc]
    """What torch asks of a device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class Copies(TorchDispatchMode):
    """Lists copies between the host and the device that the host would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "copy" in func._schema.name and isinstance(out, Tensor):
            sources = {one.device.type for one in args if isinstance(one, Tensor)} - {out.device.type}
            waits = not (kwargs or {}).get("non_blocking") and not (len(args) > 2 and args[2] is True)
            if sources and waits:
                frames = [frame for frame in traceback.extract_stack() if "/metr/" in frame.filename]
                place = frames[-1] if frames else traceback.extract_stack()[-3]
                name = place.filename.rpartition("/metr/")[2]
                self.found.append(f"copy {sources.pop()} -> {out.device.type} in {name}:{place.lineno}")
        return out


def moved(network: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A network on the meta device, as one of fake tensors on the device."""
    for module in network.modules():
        for name, value in list(module._parameters.items()):
            if value is not None:
                fake = FakeTensor(mode, value.detach(), torch.device(FAR))
                module._parameters[name] = nn.Parameter(fake, requires_grad=value.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = FakeTensor(mode, buffer.detach(), torch.device(FAR))
    return network


def faults(config: DetectorConfig, criterion: CriterionConfig) -> list[str]:
    """What goes wrong, or waits, in inference and in a training step without its matching, which needs values."""
    mode, found = FakeTensorMode(allow_non_fake_inputs=False), Copies()
    network = moved(skeleton(config, TEXT_WIDTH), mode)
    assert isinstance(network, Detector)
    try:
        with mode:
            images = torch.empty(IMAGES, 3, 96, 128, device=FAR)
            mask = torch.empty(IMAGES, 96, 128, dtype=torch.bool, device=FAR)
            text = torch.empty(NAMES, TEXT_WIDTH, device=FAR)
            with found, torch.no_grad():
                network.eval()(images, mask, text)
            with found:
                loss = _loss(network.train(), SetCriterion(criterion), (images, mask, text))
            loss.backward()
            without = [name for name, one in network.named_parameters() if one.requires_grad and one.grad is None]
            assert not without, without
            assert all(one.grad.device.type == "far" for one in network.parameters() if one.grad is not None)
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/metr/" in frame.filename]
        place = f"{frames[-1].filename.rpartition('/metr/')[2]}:{frames[-1].lineno}" if frames else "the test"
        return [*found.found, f"{type(error).__name__} in {place}: {error}"]
    return found.found


def _loss(network: nn.Module, criterion: SetCriterion, inputs: tuple[Tensor, ...]) -> Tensor:
    def numbers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=FAR)

    targets = Targets(
        boxes=numbers(IMAGES, OBJECTS, 4, dtype=torch.float32),
        labels=numbers(IMAGES, OBJECTS),
        ignore_boxes=numbers(IMAGES, 2, 4, dtype=torch.float32),
        ignore_labels=numbers(IMAGES, 2),
        annotated=numbers(IMAGES, NAMES, dtype=torch.bool),
        assumed_negative=numbers(IMAGES, NAMES, dtype=torch.bool),
        noise_seeds=(1, 2),
    )
    output = network(*inputs, targets)
    matches = Matches(**{name: numbers(6) for name in ("layer", "image", "query", "target")})
    match_statistics(output, targets, matches)
    return criterion.losses(output, query_predictions(output).matched(matches), targets).total


if __name__ == "__main__":
    _setup_privateuseone_for_python_backend("far", backend_module=Module())
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    answers = {
        name: faults(DetectorConfig(**one["model"]), CriterionConfig(**one.get("criterion", {})))
        for name, one in given.items()
    }
    print(json.dumps(answers))
