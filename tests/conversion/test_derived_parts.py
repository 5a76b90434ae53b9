"""What is computed rather than copied: heads from names, positions, norms and blocks that change nothing."""

from pathlib import Path

import pytest
import torch
from conversion_cases import NAMES, alike, normalised, random_images, stir, stirred, texts
from torch import Tensor, nn

from metr.conversion.activation_statistics import (
    ActivationStatistics,
    after_block,
    after_convolution,
    after_norm,
    four_encodings,
    of_memory,
)
from metr.conversion.classifier import (
    Linear,
    classifier,
    explained,
    fit_box_mlp,
    fit_stacked_norm,
    layer_classifier,
    name_tokens,
    norm_as_linear,
    refined_tokens,
    sample_boxes,
)
from metr.conversion.export import transfer
from metr.conversion.targets import NAMES as TARGETS
from metr.conversion.targets import find_target
from metr.errors import ConfigError, ModelError
from metr.layers.mlp import MLP
from metr.layers.position_encoding import box_encoding
from metr.models.backbones.base import BackboneConfig, FrozenBatchNorm
from metr.models.config import DetectorConfig
from metr.models.encoders.hybrid import ConvNorm, HybridEncoder, RepVggBlock
from metr.models.heads import SimilarityHead


def normal(activation_statistics: ActivationStatistics, number: int = 20_000) -> Tensor:
    return activation_statistics.mean + activation_statistics.deviation * torch.randn(
        number, len(activation_statistics.mean)
    )


def some_moments(width: int) -> ActivationStatistics:
    return ActivationStatistics(mean=torch.randn(width) * 0.5, deviation=torch.rand(width) + 0.5)


@torch.no_grad()
def test_no_linear_head_comes_nearer() -> None:
    """Against least squares on samples, which find the nearest linear function without theory."""
    head, tokens, activation_statistics = stir(SimilarityHead(16, 0.1)), torch.randn(3, 16), some_moments(16)
    given = classifier(head, tokens, activation_statistics)
    features = normal(activation_statistics)
    wanted = head(features.unsqueeze(1).expand(-1, 3, -1), tokens)
    with_one = torch.cat([features, torch.ones(len(features), 1)], dim=1)
    best = torch.linalg.lstsq(with_one, wanted).solution
    error, least = (given(features) - wanted).var(0), (with_one @ best - wanted).var(0)
    # the sum over many inputs is normal only nearly
    assert (error < least * 1.05 + 1e-6).all()
    torch.testing.assert_close(given.weight, best[:-1].T, atol=0.05, rtol=0.05)


@torch.no_grad()
def test_a_norm_as_a_linear_layer() -> None:
    norm, before = stir(nn.LayerNorm(64)), some_moments(64)
    tokens = normal(before, 500)
    wanted = norm(tokens)
    assert explained(norm_as_linear(norm, before)(tokens), wanted) > 0.95


def test_the_order_of_linear_layers() -> None:
    first, second = (
        Linear(weight=torch.randn(5, 4), bias=torch.randn(5)),
        Linear(weight=torch.randn(2, 5), bias=torch.randn(2)),
    )
    x = torch.randn(7, 4)
    torch.testing.assert_close(second.after(first)(x), second(first(x)))


@torch.no_grad()
def test_heads_of_layers_answer_as_the_similarity_head_does() -> None:
    """They fit for every draw of weights, and well for most."""
    alike_by_name = []
    for seed in range(4):
        network = stirred(alike("rt_detr"), seed)
        tokens, decoder = name_tokens(network, texts()), network.decoder
        features = normal(after_norm(decoder.layers[0].feed_forward.norm), 2000)
        wanted = decoder.similarity(decoder.norm(features).unsqueeze(1).expand(-1, len(tokens), -1), tokens)
        answer = layer_classifier(network, texts(), tokens, 0)(features)
        pairs = zip(wanted.T, answer.T, strict=True)
        alike_by_name += [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in pairs]
    assert min(alike_by_name) > 0.75
    assert sum(alike_by_name) / len(alike_by_name) > 0.8


@torch.no_grad()
def test_moments_of_convolutions() -> None:
    """With as many images as it takes, a batch norm in training gives what its weights say."""
    layer, block = stir(ConvNorm(6, 5, 1)).train(), stir(RepVggBlock(6)).train()
    level = torch.randn(64, 6, 16, 16)
    for made, expected, tolerance in (
        (layer(level), after_convolution(layer), 0.05),
        # the two convolutions of a block see the same pixels
        (block(level), after_block(block), 0.25),
    ):
        found = made.transpose(0, 1).flatten(1)
        torch.testing.assert_close(expected.mean, found.mean(1), atol=tolerance, rtol=0.1)
        torch.testing.assert_close(expected.deviation, found.std(1), atol=tolerance, rtol=0.1)


def test_an_encoder_without_layers_says_nothing_of_its_memory() -> None:
    network = stirred(alike("deformable_detr", layers=0))
    (first, *_rest) = of_memory(network.encoder)
    assert first.mean.abs().max() == 0
    assert len(of_memory(network.encoder)) == 4


@torch.no_grad()
def test_an_mlp_that_imitates_positions() -> None:
    position = stir(MLP((64, 32, 32)))
    fit = fit_box_mlp(lambda boxes: position(box_encoding(boxes, 32)), 256)
    boxes = sample_boxes(500, seed=9)
    first, second = fit.layers
    answer = second(torch.relu(first(boxes)))
    assert explained(answer, position(box_encoding(boxes, 32))) > 0.9
    assert fit.explained == pytest.approx(explained(answer, position(box_encoding(boxes, 32))), abs=0.03)
    assert "of the variance" in str(fit)


@torch.no_grad()
def test_positions_and_contents_of_deformable_detrs_queries() -> None:
    """Through their own code: encoding, linear layer, norm."""
    network = stirred(alike("deformable_detr"))
    model = transfer(find_target("deformable_detr"), network, NAMES, texts()).model.model
    boxes = sample_boxes(200, seed=3).clamp(max=0.98)
    encoded = model.get_proposal_pos_embed(boxes.logit().unsqueeze(0))[0]
    torch.testing.assert_close(four_encodings(boxes, 128), encoded, atol=1e-4, rtol=0)
    position, content = model.pos_trans_norm(model.pos_trans(encoded)).chunk(2, dim=-1)
    assert explained(position, network.decoder.position(box_encoding(boxes, 128))) > 0.8
    wanted = network.class_queries.learned.weight.mean(0) + refined_tokens(network, texts()).mean(0)
    torch.testing.assert_close(content.mean(0), wanted, atol=0.1, rtol=0)


@torch.no_grad()
def test_a_stacked_norm_holds_a_content_still() -> None:
    position, content = stir(MLP((64, 32, 32))), torch.randn(32)
    fit = fit_stacked_norm(
        lambda boxes: position(box_encoding(boxes, 32)), content, lambda boxes: box_encoding(boxes, 32)
    )
    assert fit.explained > 0.8


@pytest.mark.parametrize("mode", [False, True], ids=["evaluation", "training"])
@torch.no_grad()
def test_missing_blocks_and_the_second_projection_change_nothing(mode: bool) -> None:
    """A METR with one block a fusion becomes RT-DETR with three, and a projection of the memory more."""
    network = stirred(alike("rt_detr", fusion_blocks=1, fusion_expansion=0.5, project_memory=False))
    model = transfer(find_target("rt_detr"), network, NAMES, texts()).model.model
    assert isinstance(network.encoder, HybridEncoder)
    images = random_images(8)
    # in training the batch decides: the same batch gives both encoders the same statistics
    network.encoder.train(mode)
    for part in (model.encoder, model.encoder_input_proj, model.decoder_input_proj):
        part.train(mode)
    memory = network.encoder(network.backbone(images), torch.zeros(8, *images.shape[2:], dtype=torch.bool))
    maps = [found for found, _ in model.backbone(normalised(network, images), torch.ones(8, *images.shape[2:]))]
    levels = model.encoder([p(m) for p, m in zip(model.encoder_input_proj, maps, strict=True)]).last_hidden_state
    levels = [project(level) for project, level in zip(model.decoder_input_proj, levels, strict=True)]
    theirs = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
    if mode:
        assert explained(theirs.flatten(0, 1), memory.tokens.flatten(0, 1)) > 0.7
    else:
        torch.testing.assert_close(theirs, memory.tokens, atol=2e-3, rtol=1e-3)


def test_a_fusion_without_a_last_convolution_keeps_their_blocks() -> None:
    network = stirred(alike("rt_detr", fusion_blocks=1))
    report = transfer(find_target("rt_detr"), network, NAMES, texts()).report
    assert any("bottlenecks.1" in key for key in report.afresh)
    assert any("start afresh" in note for note in report.notes)


@torch.no_grad()
def test_another_eps_moves_into_the_variance() -> None:
    network = stirred(alike("deformable_detr"))
    for module in network.backbone.modules():
        if isinstance(module, FrozenBatchNorm):
            module.eps = 0.1
    done = transfer(find_target("deformable_detr"), network, NAMES, texts())
    images = random_images()
    theirs = done.model.model.backbone(normalised(network, images), torch.ones(2, *images.shape[2:]))
    for ours, (other, _) in zip(network.backbone(images), theirs, strict=True):
        torch.testing.assert_close(ours, other, atol=1e-4, rtol=1e-4)
    assert done.report.reshapings()["eps moved into it"] > 5


def test_another_family_gets_the_backbone() -> None:
    """Whose encoder the target has not: its backbone moves, all else starts afresh, and the report says why."""
    config = alike("rt_detr").model_copy(update={"width": 64})
    done = transfer(find_target("deformable_detr"), stirred(config), NAMES, texts())
    assert {moved.key.split(".")[1] for moved in done.report.copied} == {"backbone"}
    assert done.report.reshaped == ()
    assert any("only the backbone moves" in note for note in done.report.notes)
    advice = next(note for note in done.report.notes if "only the backbone moves" in note)
    assert "model.encoder.kind=" in advice


def test_a_target_of_another_decoder_says_so_too() -> None:
    network = stirred(alike("rt_detr"))
    done = transfer(find_target("dab_detr"), network, NAMES, texts())
    advice = next(note for note in done.report.notes if "only the backbone moves" in note)
    assert "model.encoder.kind=plain and model.decoder.kind=conditional" in advice
    assert done.model.config.encoder_layers == 6


@pytest.mark.parametrize(
    ("ours", "target"), [("d_fine", "rt_detr"), ("rt_detr", "d_fine"), ("deimv2", "rt_detr"), ("d_fine", "deimv2")]
)
def test_other_fusions_start_afresh(ours: str, target: str) -> None:
    report = transfer(find_target(target), stirred(alike(ours)), NAMES, texts()).report
    assert any(key.startswith("model.encoder.fpn_blocks") for key in report.afresh)
    assert any("start afresh" in note for note in report.notes)
    assert any(moved.key.startswith("model.encoder.aifi") for moved in report.copied)


def test_names_of_targets() -> None:
    assert find_target("RT-DETR").name == "rt_detr"
    with pytest.raises(ConfigError, match="no detector") as error:
        find_target("rt_dtr")
    assert "rt_detr" in str(error.value.hint)
    assert {find_target(name).name for name in TARGETS} == set(TARGETS)


def test_a_width_that_group_norms_do_not_divide() -> None:
    config = alike("deformable_detr").model_copy(update={"width": 48})
    with pytest.raises(ModelError, match="a width that 32 divides"):
        transfer(find_target("deformable_detr"), stirred(config), NAMES, texts())


def test_names_that_are_none() -> None:
    network = stirred(alike("rt_detr"))
    for names in ((), ("a", "a")):
        with pytest.raises(ConfigError, match="each once"):
            transfer(find_target("rt_detr"), network, names, texts(len(names)))


def test_the_report_counts_everything_once(tmp_path: Path) -> None:
    network = stirred(alike("rt_detr"))
    done = transfer(find_target("rt_detr"), network, NAMES, texts())
    report, state = done.report, done.model.state_dict()
    keys = [moved.key for moved in (*report.copied, *report.reshaped)] + list(report.afresh)
    assert len(keys) == len(set(keys))
    assert set(keys) == set(state)
    assert set(report.left_over).isdisjoint(source for moved in report.copied for source in moved.source)
    assert report.counts["copied"] == len(report.copied) > 100
    assert done.model.config.id2label == dict(enumerate(NAMES))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("target", ["deformable_detr", "rt_detr"])
@torch.no_grad()
def test_efficientnet_goes_along(target: str, frozen: bool) -> None:
    """Its eps of 1e-3 included, whichever way the detector freezes norms."""
    options = {"width": 0.25, "depth": 0.5}
    backbone = BackboneConfig(
        name="efficientnet_lite0", pretrained=False, options=options, freeze_stages=0, freeze_batch_norm=frozen
    )
    network = stirred(alike(target).model_copy(update={"backbone": backbone}))
    done = transfer(find_target(target), network, NAMES, texts())
    images = random_images()
    theirs = done.model.model.backbone(normalised(network, images), torch.ones(2, *images.shape[2:]))
    for ours, (other, _) in zip(network.backbone(images), theirs, strict=True):
        torch.testing.assert_close(ours, other, atol=1e-4, rtol=1e-4)


def test_positions_that_do_not_suit_the_encoder() -> None:
    for kind, positions in (("hybrid", "centred"), ("deformable", "counted"), ("plain", "centred")):
        with pytest.raises(ConfigError, match=f"encoder.positions '{positions}' is for"):
            DetectorConfig.checked({"encoder": {"kind": kind, "positions": positions}})


@torch.no_grad()
def test_queries_contain_refined_tokens_whatever_they_are_compared_with() -> None:
    config = alike("rt_detr")
    network = stirred(config.model_copy(update={"similarity": config.similarity.model_copy(update={"token": "text"})}))
    state = transfer(find_target("rt_detr"), network, NAMES, texts()).model.state_dict()
    assert network.denoising is not None
    contents = refined_tokens(network, texts()) + network.denoising.learned
    torch.testing.assert_close(state["model.denoising_class_embed.weight"][:-1], contents)
    torch.testing.assert_close(name_tokens(network, texts()), network.category_extraction.project(texts()).tokens)
