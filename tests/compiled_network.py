"""Compiles small networks, and says how far they are from the plain ones and how often they were compiled.

    python tests/compiled_network.py CONFIGURATION.json

The file maps names to a `DetectorConfig`. It takes a process of its own, in which no annotation is executed: compilers
do not see through that. Printed is a JSON object: for each name the largest difference of an output or gradient, the
number of graphs after each image size, and the number of graph breaks.
"""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from metr.models.config import DetectorConfig
from metr.models.detector import Detector, compile_parts

TEXT_WIDTH = 24
SIZES = ((64, 96), (96, 64), (128, 96))


def compared(config: DetectorConfig) -> dict[str, Any]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    plain = Detector(config, TEXT_WIDTH).eval()
    ours = copy.deepcopy(plain)
    compile_parts(ours, backend="aot_eager")
    text = torch.nn.functional.normalize(torch.randn(6, TEXT_WIDTH), dim=-1)
    worst, graphs = 0.0, []
    for height, width in SIZES:
        images, mask = torch.rand(2, 3, height, width), torch.zeros(2, height, width, dtype=torch.bool)
        mask[1, :, width - 10 :] = True
        answers = []
        for network in (plain, ours):
            network.zero_grad()
            output = network(images, mask, text)
            (output.logits.sigmoid().sum() + output.boxes.sum()).backward()
            gradients = [one.grad for one in network.parameters() if one.grad is not None]
            norm = torch.stack([one.norm() for one in gradients]).norm()
            answers.append((output.logits.detach(), output.boxes.detach(), torch.log(norm)))
        worst = max(worst, *(float((one - other).abs().max()) for one, other in zip(*answers, strict=True)))
        graphs.append(counters["stats"]["unique_graphs"])
    return {"difference": worst, "graphs": graphs, "breaks": sum(counters["graph_break"].values())}


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(json.dumps({name: compared(DetectorConfig(**config)) for name, config in given.items()}))
