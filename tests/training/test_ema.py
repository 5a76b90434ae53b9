"""The average of the weights."""

import math

import pytest
import torch
from torch import nn

from metr.training.config import EmaConfig
from metr.training.ema import Ema, KeptBuffers


def test_follows_the_recurrence_and_copies_buffers() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ema = Ema(network, EmaConfig(decay=0.9, tau=5))
    expected = network[0].weight.detach().clone()
    for step in range(1, 6):
        with torch.no_grad():
            network[0].weight.add_(torch.randn(4, 3))
        network(torch.randn(8, 3))
        ema.update(step)
        decay = 0.9 * (1 - math.exp(-step / 5))
        expected = decay * expected + (1 - decay) * network[0].weight.detach()
    averaged, norm = ema.network[0], ema.network[1]
    torch.testing.assert_close(averaged.weight, expected)
    assert not torch.equal(averaged.weight, network[0].weight)
    for name, buffer in network[1].named_buffers():
        assert torch.equal(buffer, norm.get_buffer(name)), name
    assert norm.num_batches_tracked == 5


def test_the_decay_warms_up() -> None:
    ema = Ema(nn.Linear(1, 1), EmaConfig(decay=0.999, tau=100))
    decays = [ema.decay(step) for step in (1, 10, 100, 10_000)]
    assert decays == sorted(decays)
    assert decays[0] < 0.01
    assert decays[-1] == pytest.approx(0.999)


def test_the_average_is_a_network_apart() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
    ema = Ema(network, EmaConfig())
    assert not ema.network.training
    assert not any(parameter.requires_grad for parameter in ema.network.parameters())
    with torch.no_grad():
        network[0].weight.zero_()
    assert ema.network[0].weight.abs().sum() > 0
    assert network.training
    assert network[0].weight.requires_grad


def test_buffers_are_kept_and_put_back() -> None:
    network = nn.BatchNorm1d(3).train()
    kept = KeptBuffers(network)
    network(torch.randn(4, 3))
    kept.keep()
    good = network.running_mean.clone()
    network(torch.full((4, 3), float("nan")))
    assert network.running_mean.isnan().all()
    kept.restore()
    assert torch.equal(network.running_mean, good)
    assert network.num_batches_tracked == 1
    KeptBuffers(nn.Linear(1, 1)).restore()
