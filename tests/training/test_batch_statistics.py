"""Statistics of the average's batch norms: those of brute force, of learnt norms only, and where they are used."""

import copy
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from metr.checkpoint import load_checkpoint
from metr.layers.batch_norm import SynchronizedBatchNorm
from metr.models.detector import Detector
from metr.structures import Batch
from metr.training.batch_statistics import estimated_statistics, learned_batch_norms, take_statistics
from metr.training.parts import Evaluated
from metr.training.trainer import Trainer
from small_runs import make_config, make_parts

from small import small_config, small_detector


def norms(network: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {name: one for name, one in network.named_modules() if isinstance(one, nn.BatchNorm2d)}


def brute_force(network: Detector, batches: list[Batch], names: tuple[str, ...]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance of all that enters each norm, kept in one piece."""
    network = copy.deepcopy(network).eval()
    entered: dict[str, list[Tensor]] = {name: [] for name in names}
    for name in names:
        norm = network.get_submodule(name).train()
        norm.register_forward_pre_hook(lambda _, inputs, name=name: entered[name].append(inputs[0].clone()))  # type: ignore[misc]
    with torch.no_grad():
        for batch in batches:
            network.encode(batch.images, batch.padding_mask)
    whole = {name: torch.cat([part.transpose(0, 1).flatten(1) for part in parts], 1) for name, parts in entered.items()}
    return {name: (values.mean(1), values.var(1)) for name, values in whole.items()}


def test_they_equal_brute_force_and_nothing_else_changes(tmp_path: Path) -> None:
    torch.manual_seed(3)
    network = small_detector(small_config(encoder="hybrid")).train()
    network.encoder.up_fusions[0].eval()  # as what is frozen is  # type: ignore[union-attr,operator]
    names = learned_batch_norms(network)
    frozen = norms(network).keys() - set(names)
    assert len(names) > 10
    assert frozen
    assert all(name.startswith("encoder.up_fusions.0.") for name in frozen)
    loader = make_parts(tmp_path, batch_size=3).loader(seed=0)
    # batches of different sizes weigh as much as they have cells
    batches = [batch for batch, _ in zip(loader, range(3), strict=False)]
    batches.append(next(iter(make_parts(tmp_path, batch_size=2, size=64).loader(seed=1))))
    network.eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    accelerator = Accelerator(cpu=True)
    found = estimated_statistics(network, names, batches, accelerator)
    assert not any(one.training for one in network.modules())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    for name, (mean, variance) in brute_force(network, batches, names).items():
        torch.testing.assert_close(found[name][0], mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[name][1], variance, rtol=1e-4, atol=1e-6)
    take_statistics(network, found)
    changed = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {f"{name}.{kind}" for name in names for kind in ("running_mean", "running_var")}
    for one in norms(network).values():
        one.__class__ = SynchronizedBatchNorm
    again = estimated_statistics(network, names, batches, accelerator)
    assert all(torch.equal(again[name][0], mean) for name, (mean, _) in found.items())


class Seen:
    """An evaluation that keeps the statistics of the network it is shown."""

    def __init__(self) -> None:
        self.statistics: list[dict[str, Tensor]] = []

    def __call__(self, network: nn.Module) -> Evaluated:
        self.statistics.append({key: value.clone() for key, value in network.state_dict().items() if "running" in key})
        return Evaluated(metrics={"AP": float(len(self.statistics))})


def trained(folder: Path, images: int, name: str, *, evaluated: bool = True) -> tuple[Trainer, Seen]:
    config = make_config(2, ema={"batch_norm_images": images}, loop={"evaluate_every": 2})
    seen = Seen()
    trainer = Trainer(make_parts(folder, encoder="hybrid"), config, folder / name, evaluate=seen if evaluated else None)
    trainer.fit()
    return trainer, seen


def test_they_are_evaluated_and_saved_and_training_does_not_notice(tmp_path: Path) -> None:
    (plain, as_before), (trainer, seen) = trained(tmp_path, 0, "plain"), trained(tmp_path, 5, "own")
    for one, other in zip(plain.plain_network.parameters(), trainer.plain_network.parameters(), strict=True):
        assert torch.equal(one, other)
    assert trainer.ema is not None
    assert plain.ema is not None
    # without images they are averages of the trained network's, as the weights are (test_optimization)
    running = plain.ema.network.state_dict()
    assert all(torch.equal(value, running[key]) for key, value in as_before.statistics[-1].items())
    # three batches of two images that come after the last step's
    loader = make_parts(tmp_path).loader(seed=0, start=2 * 2)
    batches = [batch for batch, _ in zip(loader, range(3), strict=False)]
    average = copy.deepcopy(trainer.ema.network)
    assert isinstance(average, Detector)
    expected = brute_force(average, batches, learned_batch_norms(trainer.plain_network))
    saved = {name: load_checkpoint(tmp_path / "own" / name).weights for name in ("last", "best")}
    for name, (mean, variance) in expected.items():
        for kept in (seen.statistics[-1], saved["last"], saved["best"]):
            torch.testing.assert_close(kept[f"{name}.running_mean"], mean, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(kept[f"{name}.running_var"], variance, rtol=1e-4, atol=1e-6)
    without, _ = trained(tmp_path, 5, "unevaluated", evaluated=False)
    assert without.ema is not None
    last = load_checkpoint(tmp_path / "unevaluated" / "last").weights
    assert all(torch.equal(value, saved["last"][key]) for key, value in last.items() if "running" in key)
