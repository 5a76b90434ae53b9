"""Fused convolutions: what the plain ones give, and only where nobody wants a gradient."""

import pytest
import torch
from torch import Tensor, nn

from metr.layers import convolution
from metr.models.backbones.base import freeze_batch_norms
from metr.models.backbones.efficientnet_lite import ConvNorm, EfficientNetLite


def network() -> EfficientNetLite:
    """Three frozen stages with statistics of their own."""
    torch.manual_seed(0)
    built = EfficientNetLite(width=0.25, stages=3)
    for module in built.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn_like(module.bias)
            module.running_var = torch.rand_like(module.bias) + 0.5
            nn.init.normal_(module.bias)
    freeze_batch_norms(built)
    return built


@pytest.mark.skipif(not convolution._is_right(), reason="this torch has no fused convolution")
def test_it_equals_the_plain_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    built, used = network(), list[Tensor]()
    fuse = convolution.fused_convolution

    def counted(*given: Tensor, **options: object) -> Tensor:
        used.append(given[0])
        return fuse(*given, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("metr.models.backbones.efficientnet_lite.fused_convolution", counted)
    layers = sum(isinstance(module, ConvNorm) for module in built.modules())
    # odd sides too, and either layout of memory
    for images in (torch.randn(2, 3, 45, 64), torch.randn(1, 3, 32, 33).contiguous(memory_format=torch.channels_last)):
        used.clear()
        with torch.no_grad():
            fused = built(images)
        assert len(used) == layers
        plain = built(images)  # its weights want gradients
        assert len(used) == layers
        for one, other in zip(fused, plain, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    # a frozen stem under stages that are trained, as in training
    used.clear()
    built.stem.requires_grad_(False)
    built(images)[-1].sum().backward()
    assert len(used) == 1
    assert built.stem.convolution.weight.grad is None
    assert all(parameter.grad is not None for parameter in built.stages.parameters())
    # where images want a gradient, nothing is fused
    used.clear()
    built(images.clone().requires_grad_())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        built(images)
    assert not used


def test_a_torch_without_the_operator_goes_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    convolution._is_right.cache_clear()

    def missing(*_: object, **__: object) -> Tensor:
        raise AttributeError("no such operator")

    with monkeypatch.context() as patch:
        patch.setattr(convolution, "fused_convolution", missing)
        with torch.no_grad():
            assert not convolution.fuses(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1))
    convolution._is_right.cache_clear()
