"""Fused convolutions: values and gradients of the plain ones, and the precision that was asked for."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, relu6

from metr.layers import convolution
from metr.layers.convolution import dense_gradient, fused_convolution, fuses
from metr.models.backbones.base import freeze_batch_norms
from metr.models.backbones.efficientnet_lite import ConvNorm, EfficientNetLite

fused = pytest.mark.skipif(not convolution._is_right(torch.float32), reason="this torch has no fused convolution")
low = pytest.mark.skipif(not convolution._is_right(torch.bfloat16), reason="this processor has no bf16")


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


@pytest.fixture
def forget() -> Iterator[None]:
    """What is known of this torch is asked anew."""
    convolution._is_right.cache_clear()
    yield
    convolution._is_right.cache_clear()


@fused
@pytest.mark.parametrize("gradients", [False, True])
def test_a_network_equals_one_of_plain_convolutions(monkeypatch: pytest.MonkeyPatch, gradients: bool) -> None:
    built, used = network(), list[Tensor]()
    fuse = fused_convolution

    def counted(*given: Tensor, **options: object) -> Tensor:
        used.append(given[0])
        return fuse(*given, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("metr.models.backbones.efficientnet_lite.fused_convolution", counted)
    layers = sum(isinstance(module, ConvNorm) for module in built.modules())
    # odd sides too, and either layout of memory
    for images in (torch.randn(2, 3, 45, 64), torch.randn(1, 3, 32, 33).contiguous(memory_format=torch.channels_last)):
        used.clear()
        found = answers(built, images, gradients)
        assert len(used) == layers
        with monkeypatch.context() as patch:
            patch.setattr("metr.models.backbones.efficientnet_lite.fuses", lambda *_: False)
            plain = answers(built, images, gradients)
        assert len(used) == layers
        for one, other in zip(found, plain, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def answers(built: EfficientNetLite, images: Tensor, gradients: bool) -> list[Tensor]:
    """All maps, and the gradients of all weights and of the images."""
    with torch.set_grad_enabled(gradients):
        images = images.clone().requires_grad_(gradients)
        maps = list(built(images))
        if not gradients:
            return maps
        leaves = [images, *built.parameters()]
        total = torch.stack([(level * level.detach().cos()).mean() for level in maps]).sum()
        return [*(level.detach() for level in maps), *torch.autograd.grad(total, leaves)]


@fused
@pytest.mark.parametrize("relu6_follows", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("size", "stride", "groups"),
    [(1, 1, 1), (3, 2, 1), (1, 1, 6), (2, 1, 6), (3, 1, 6), (4, 2, 6), (5, 1, 6), (6, 2, 6), (7, 1, 6), (8, 3, 6)],
)
def test_gradients_are_those_of_plain_convolutions(
    size: int, stride: int, groups: int, biased: bool, relu6_follows: bool
) -> None:
    """Depthwise kernels of every width: their columns are done a few at a time."""
    check_gradients((9, 11), size, stride, groups, biased, relu6_follows)


@fused
@pytest.mark.parametrize("sides", [(1, 1), (2, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("size", [3, 5, 7, 9])
def test_kernels_may_be_larger_than_the_features(sides: tuple[int, int], size: int) -> None:
    check_gradients(sides, size, 1, 6, True, True)


def check_gradients(
    sides: tuple[int, int], size: int, stride: int, groups: int, biased: bool, relu6_follows: bool
) -> None:
    random = torch.Generator().manual_seed(size)
    features = torch.randn(2, 6, *sides, generator=random).mul_(3).requires_grad_()
    kernel = torch.randn(6, 6 // groups, size, size, generator=random).requires_grad_()
    bias = torch.randn(6, generator=random).requires_grad_() if biased else None
    padding = ((size - 1) // 2, size // 2)
    found = fused_convolution(
        features, kernel, bias, stride=stride, padding=padding, groups=groups, relu6=relu6_follows
    )
    plain = conv2d(features, kernel, bias, stride, padding, 1, groups)
    plain = relu6(plain) if relu6_follows else plain
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-4)
    leaves = [leaf for leaf in (features, kernel, bias) if leaf is not None]
    given = torch.randn(found.shape, generator=random)
    for one, other in zip(
        torch.autograd.grad(found, leaves, given), torch.autograd.grad(plain, leaves, given), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)


@low
@pytest.mark.parametrize(("size", "stride", "groups"), [(1, 1, 1), (5, 1, 6), (6, 2, 6)])
def test_autocast_is_near_and_gives_gradients_in_float32(size: int, stride: int, groups: int) -> None:
    random = torch.Generator().manual_seed(size)
    features = torch.randn(2, 6, 9, 11, generator=random).requires_grad_()
    kernel = torch.randn(6, 6 // groups, size, size, generator=random).requires_grad_()
    padding = ((size - 1) // 2, size // 2)
    with torch.autocast("cpu", torch.bfloat16):
        found = fused_convolution(features, kernel, None, stride=stride, padding=padding, groups=groups)
    assert found.dtype == torch.bfloat16
    plain = conv2d(features, kernel, None, stride, padding, 1, groups)
    torch.testing.assert_close(found.float(), plain, atol=0.2, rtol=0.02)
    given = torch.randn(found.shape, generator=random)
    low_gradients = torch.autograd.grad(found, [features, kernel], given.bfloat16())
    for one, other in zip(low_gradients, torch.autograd.grad(plain, [features, kernel], given), strict=True):
        assert one.dtype == torch.float32
        assert float((one - other).norm() / other.norm()) < 0.02


def test_what_wants_no_gradient_gets_none() -> None:
    built = network()
    built.stem.requires_grad_(False)
    built(torch.randn(1, 3, 32, 32))[-1].sum().backward()
    assert built.stem.convolution.weight.grad is None
    assert all(parameter.grad is not None for parameter in built.stages.parameters())


def missing(*_: object, **__: object) -> Tensor:
    raise AttributeError("no such operator")


def wrong(*_: object, **__: object) -> Tensor:
    return torch.zeros(2, 8, 4, 4)


@pytest.mark.usefixtures("forget")
@pytest.mark.parametrize("operator", [missing, wrong])
def test_a_torch_without_the_operator_goes_the_plain_way(
    monkeypatch: pytest.MonkeyPatch, operator: Callable[..., Tensor]
) -> None:
    monkeypatch.setattr(convolution._Fused, "apply", operator)
    assert not fuses(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1))


@pytest.mark.usefixtures("forget")
def test_a_processor_without_bf16_is_not_asked_to_imitate_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "_has_bf16", lambda: False)
    with torch.autocast("cpu", torch.bfloat16):
        assert not fuses(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1))
        assert network()(torch.randn(1, 3, 32, 32))[-1].isfinite().all()


def test_the_dense_gradient_is_the_gradient() -> None:
    features = torch.randn(2, 3, 4, 5, requires_grad=True)
    dense = dense_gradient(features)
    assert torch.equal(dense, features)
    given = torch.randn(2, 9, 4, 5)[:, 3:6]
    (found,) = torch.autograd.grad(dense, features, given)
    assert torch.equal(found, given)
    assert found.is_contiguous(memory_format=torch.channels_last)
    plain = features.detach()
    assert dense_gradient(plain) is plain
