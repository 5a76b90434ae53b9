"""Loading weights, and the report of those that do not fit."""

import pytest
import torch
from torch import nn

from metr.errors import CheckpointError
from metr.serialization import load_weights


def network(width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2))


def test_weights_are_copied_and_converted() -> None:
    source, target = network(), network()
    report = load_weights(target, {key: value.half() for key, value in source.state_dict().items()})
    assert report.complete
    assert str(report) == "4 weights fit"
    torch.testing.assert_close(target[0].weight, source[0].weight, atol=1e-3, rtol=1e-3)
    assert target[0].weight.dtype == torch.float32


def test_another_size_names_key_and_both_shapes_and_changes_nothing() -> None:
    target = network(4)
    before = target[1].bias.detach().clone()
    with pytest.raises(CheckpointError) as caught:
        load_weights(target, network(6).state_dict(), where="run/best/model.safetensors")
    message = str(caught.value)
    assert message.startswith("run/best/model.safetensors: ")
    assert "3 of another shape" in message
    assert "0.weight: expected [4, 3], found [6, 3]" in message
    assert "another size" in message
    assert torch.equal(target[1].bias, before)


def test_missing_and_unexpected_keys_are_listed_shortly() -> None:
    weights = {f"{index}.weight": torch.zeros(1) for index in range(10, 30)} | {"0.weight": torch.zeros(4, 3)}
    with pytest.raises(CheckpointError) as caught:
        load_weights(network(), weights)
    message = str(caught.value)
    assert "3 missing from the weights" in message
    assert "0.bias" in message
    assert "20 unknown to the network" in message
    assert "and 16 more" in message
    assert len(message.splitlines()) < 16


def test_lenient_loading_takes_what_fits() -> None:
    target = network(4)
    weights = {"1.bias": torch.ones(2), "0.weight": torch.ones(9, 9), "other": torch.ones(1)}
    report = load_weights(target, weights, strict=False)
    assert report.loaded == ("1.bias",)
    assert report.missing == ("0.bias", "1.weight")
    assert report.unexpected == ("other",)
    assert report.misshapen == (("0.weight", (4, 3), (9, 9)),)
    assert torch.equal(target[1].bias, torch.ones(2))
