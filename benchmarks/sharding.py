"""How much memory does a process keep of a network in training, with the whole network each and sharded?

    python benchmarks/sharding.py
    torchrun --nproc-per-node 2 benchmarks/sharding.py

Counts the bytes of weights, gradients, moments of AdamW and average of the weights that each process keeps between two
steps, from the tensors themselves: no activations, and nothing that is there for a moment only. Sizes are the recipes'
networks with random weights.

METR-base (results/sharding.json): 989 MB in one process, 495 MB in each of two.

Results: `results/sharding.json`, to which each number of processes adds its own.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import report
import runner
from metr.config import Tree
from metr.models.detector import Detector
from metr.processes import process_count
from metr.training.config import SIZES, load_recipe
from metr.training.engine import build_engine
from metr.training.optimization import build_optimizer

TEXT_WIDTH = 512


def kept_bytes(size: str, accelerator: Accelerator) -> Tree:
    """The bytes that this process keeps of the network of one recipe, by what they are."""
    recipe = load_recipe(size)
    backbone = recipe.model.backbone.model_copy(update={"pretrained": False})
    network: nn.Module = Detector(recipe.model.model_copy(update={"backbone": backbone}), TEXT_WIDTH)
    engine = build_engine("fsdp", accelerator, network, averaged=True)
    optimizer = build_optimizer(network, recipe.train.optimizer)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    average = engine.average
    assert average is not None
    moments = [value for state in optimizer.state.values() for value in state.values()]
    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "weights": _bytes(network.parameters()),
        "gradients": _bytes(parameter.grad for parameter in trained if parameter.grad is not None),
        "moments": _bytes(moments),
        "average": _bytes(average.parameters()),
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    own = (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors)
    return sum(tensor.numel() * tensor.element_size() for tensor in own)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and writes; see `runner.exit_status`."""
    parser = runner.option_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    given = parser.parse_args(arguments)
    results: Path = given.results

    def work() -> bool:
        accelerator = Accelerator(cpu=True)
        found = {size: kept_bytes(size, accelerator) for size in given.sizes}
        if accelerator.is_main_process:
            path = results / "sharding.json"
            earlier = json.loads(path.read_text(encoding="utf-8"))["processes"] if path.is_file() else {}
            about = runner.circumstances("sharding", runner.commit(), "cpu")
            report.write_result(results / "sharding", {**about, "processes": earlier | {str(process_count()): found}})
        return True

    return runner.exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
