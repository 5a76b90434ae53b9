"""Feed-forward parts against the same written out."""

import torch
from torch import nn
from torch.nn.functional import gelu, layer_norm, linear, relu

from metr.layers.mlp import MLP, FeedForward


def test_mlp_has_a_relu_between_layers_and_none_at_the_end() -> None:
    mlp = MLP((6, 5, 4, 3))
    layers = [layer for layer in mlp if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in layers] == [(6, 5), (5, 4), (4, 3)]
    assert mlp.last is layers[-1]
    features = torch.randn(2, 7, 6)
    expected = layers[2](relu(layers[1](relu(layers[0](features)))))
    torch.testing.assert_close(mlp(features), expected)
    assert (mlp(features) < 0).any()


def test_feed_forward_adds_and_normalises() -> None:
    for activation, function in ((nn.ReLU, relu), (nn.GELU, gelu)):
        part = FeedForward(8, 12, activation)
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.normal_()
        tokens = torch.randn(2, 5, 8)
        hidden = function(linear(tokens, part.widen.weight, part.widen.bias))
        changed = tokens + linear(hidden, part.narrow.weight, part.narrow.bias)
        expected = layer_norm(changed, (8,), part.norm.weight, part.norm.bias)
        torch.testing.assert_close(part(tokens), expected, atol=1e-5, rtol=1e-5)


def test_each_token_is_changed_by_itself() -> None:
    part = FeedForward(8, 12)
    tokens = torch.randn(2, 5, 8)
    torch.testing.assert_close(part(tokens)[:, 2:3], part(tokens[:, 2:3]))
