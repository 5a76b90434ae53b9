"""Several processes: each sees its share of the draws, and together they make the steps of one with the whole batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from metr.layers.batch_norm import SynchronizedBatchNorm, synchronize_batch_norms
from metr.training.logger import read_metrics
from metr.training.trainer import Trainer
from small_runs import make_config, make_parts
from two_processes import launched

STEPS = 20
# Batch norms, denoising and sampled names: all that a process could compute or draw for itself.
NETWORK: dict[str, Any] = {"encoder": "hybrid", "denoising": 20, "size": 64}
# A large epsilon: AdamW makes whole steps of gradients that are nothing but rounding errors.
CHANGES: dict[str, Any] = {
    "optimizer": {"epsilon": 1e-2},
    "loop": {"log_every": 1, "evaluate_every": 10, "vocabulary_sample": 3},
}
SCRIPT = f"""
import sys
from pathlib import Path
from metr.training.parts import Evaluated
from metr.training.trainer import Trainer
from small_runs import make_config, make_parts

def run(stop):
    parts = make_parts(Path(sys.argv[1]), batch_size=2, **{NETWORK!r})
    config = make_config({STEPS}, **{CHANGES!r})
    evaluate = lambda network: Evaluated(metrics={{"AP": float(next(network.parameters()).abs().sum())}})
    trainer = Trainer(parts, config, Path(sys.argv[1]) / "run", evaluate=evaluate)
    def ask(module, inputs):
        trainer._stop_signals.requested |= trainer.counters.step + 1 == stop
    if trainer.accelerator.process_index == 1:
        trainer.plain_network.register_forward_pre_hook(ask)
    return trainer.fit(resume=True).step

assert [run(stop=13), run(stop=0)] == [13, {STEPS}], "both stop when the second is asked to, and go on"
"""
NORMS = """
import sys
import torch
from pathlib import Path
from torch import distributed, nn
from metr.layers.batch_norm import synchronize_batch_norms
distributed.init_process_group("gloo")
rank = distributed.get_rank()
given = torch.load(sys.argv[1] + "/given.pt", weights_only=True)
norm = nn.BatchNorm2d(3)
synchronize_batch_norms(nn.Sequential(norm))
features = given["features"][rank::2].clone().requires_grad_()
out = norm(features)
(out * given["weights"][rank::2]).sum().backward()
found = {"out": out, "gradient": features.grad, "scale": norm.weight.grad, **norm.state_dict()}
torch.save({name: value.detach() for name, value in found.items()}, f"{sys.argv[1]}/{rank}.pt")
distributed.destroy_process_group()
"""


@pytest.mark.trains
@pytest.mark.slow
def test_two_processes_make_the_steps_of_one(tmp_path: Path) -> None:
    make_parts(tmp_path)  # writes the images before two processes do
    launched(SCRIPT, tmp_path)

    config = make_config(STEPS, **CHANGES)
    alone = Trainer(make_parts(tmp_path, batch_size=4, **NETWORK), config, tmp_path / "alone")
    alone.fit()
    ours, theirs = read_metrics(tmp_path / "run"), read_metrics(tmp_path / "alone")
    training = [record for record in ours if record["kind"] == "train"]
    assert [record["step"] for record in training] == [*range(1, STEPS + 1)]
    assert [record["step"] for record in ours if record["kind"] == "evaluation"] == [10, 20], "one process writes"
    for record, expected in zip(training, theirs, strict=True):
        assert record["images"] == expected["images"]
        assert record["epochs"] == expected["epochs"]
        assert record["losses"] == pytest.approx(expected["losses"], rel=1e-5, abs=1e-5), record["step"]
        assert record["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-3)
    state = tmp_path / "run" / "state"
    expected = alone.plain_network.state_dict()
    for name, value in load_file(state / "network.safetensors").items():
        torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=1e-4, msg=name)
    random = load_file(state / "random.safetensors")
    assert all(len(rows) == 2 for rows in random.values())
    assert not torch.equal(*random["torch.cpu"])
    _check_statistics(tmp_path / "run", alone)


def _check_statistics(run: Path, alone: Trainer) -> None:
    """The checkpoint has the statistics of batch norms that training has gathered."""
    assert alone.ema is not None
    expected, saved = alone.ema.network.state_dict(), load_file(run / "last" / "model.safetensors")
    statistics = [name for name in saved if "running_" in name and name.startswith("encoder.")]
    assert len(statistics) > 10
    for name in statistics:
        assert not torch.equal(saved[name], torch.full_like(saved[name], float(name.endswith("var")))), name
        torch.testing.assert_close(saved[name], expected[name], atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.slow
def test_batch_norms_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    given = {"features": 5 + torch.randn(6, 3, 4, 5), "weights": torch.randn(6, 3, 4, 5)}
    torch.save(given, tmp_path / "given.pt")
    launched(NORMS, tmp_path)
    norm, features = nn.BatchNorm2d(3), given["features"].requires_grad_()
    out = norm(features)
    (out * given["weights"]).sum().backward()
    assert norm.weight.grad is not None
    assert features.grad is not None
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for rank, found in enumerate(parts):
        torch.testing.assert_close(found["out"], out.detach()[rank::2], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found["gradient"], features.grad[rank::2], atol=1e-5, rtol=1e-5)
        for name, value in norm.state_dict().items():
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(parts[0]["scale"] + parts[1]["scale"], norm.weight.grad, atol=1e-4, rtol=1e-5)


def test_a_synchronized_batch_norm_keeps_its_tensors_and_alone_it_changes_nothing() -> None:
    norm, features = nn.BatchNorm2d(3), torch.randn(2, 3, 4, 4)
    tensors = [*norm.parameters(), *norm.buffers()]
    expected = nn.BatchNorm2d(3)(features)
    synchronize_batch_norms(nn.Sequential(norm))
    assert isinstance(norm, SynchronizedBatchNorm)
    assert all(ours is before for ours, before in zip([*norm.parameters(), *norm.buffers()], tensors, strict=True))
    assert torch.equal(norm(features), expected)
