"""Properties of the network, each one an issue of published code."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from metr.layers.position_encoding import box_encoding
from metr.models.config import DetectorConfig
from metr.models.detector import Detector, skeleton, unfilled
from metr.models.heads import similarity_tokens
from metr.models.proposals import anchor_logits
from metr.structures import Queries, Targets, gather_rows

from small import adopted_config, small_config, small_detector, targets_of

TEXT = torch.nn.functional.normalize(torch.randn(9, 24, generator=torch.Generator().manual_seed(1)), dim=-1)
LAYOUTS = ["budget", "uniform", "shared", "places"]
FAMILIES = ["deformable", "hybrid", "plain", "projector"]
NO_MASK = torch.zeros(1, 64, 96, dtype=torch.bool)


def random_images(number: int, height: int = 64, width: int = 96) -> Tensor:
    return torch.rand(number, 3, height, width, generator=torch.Generator().manual_seed(2))


def mask_of(number: int) -> Tensor:
    return NO_MASK.expand(number, -1, -1)


@pytest.mark.parametrize("encoder", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_batch_invariance(layout: str, encoder: str) -> None:
    """[A, B] of one padded shape gives what A and B alone give, padding included."""
    detector = small_detector(small_config(layout=layout, encoder=encoder)).eval()
    images, mask = random_images(2), mask_of(2).clone()
    mask[1, 50:], mask[1, :, 70:] = True, True
    images = images.masked_fill(mask.unsqueeze(1), 0)
    both = detector(images, mask, TEXT)
    for index in range(2):
        alone = detector(images[index : index + 1], mask[index : index + 1], TEXT)
        torch.testing.assert_close(alone.logits[:, 0], both.logits[:, index], atol=1e-4, rtol=0)
        torch.testing.assert_close(alone.boxes[:, 0], both.boxes[:, index], atol=1e-4, rtol=0)
        assert torch.equal(alone.categories.ids[0], both.categories.ids[index])


@pytest.mark.parametrize("encoder", ["deformable", "plain"])
@torch.no_grad()
def test_padding_invariance_from_projected_features_on(encoder: str) -> None:
    """Padding to a larger shape changes nothing, whatever lies there."""
    from metr.models.encoders.pyramid import flatten

    config = small_config(encoder=encoder)
    detector = small_detector(config).eval()
    shapes, wider = [(8, 12), (4, 6), (2, 3)], [(12, 16), (6, 8), (3, 4)]
    levels = slice(0, 1) if encoder == "plain" else slice(None)
    maps = [torch.randn(1, config.width, *shape) for shape in shapes[levels]]
    padded = []
    for level, (height, width) in zip(maps, wider[levels], strict=True):
        larger = torch.randn(1, config.width, height, width)
        larger[..., : level.shape[2], : level.shape[3]] = level
        padded.append(larger)
    small_mask = torch.zeros(1, 64, 96, dtype=torch.bool)
    large_mask = torch.ones(1, 96, 128, dtype=torch.bool)
    large_mask[:, :64, :96] = False
    answers = []
    for levels, mask in ((maps, small_mask), (padded, large_mask)):
        start = flatten(levels, mask)
        memory = detector.encoder.refine(start) if encoder == "plain" else detector.encoder.refine(start, mask)
        categories = detector.category_extraction(memory, TEXT)
        proposals, places = detector.proposals(memory, categories)
        queries = detector.class_queries(proposals, places, categories)
        decoded = detector.decoder(queries, memory)
        answers.append((categories.presence_logits, decoded.features, decoded.boxes))
    for ours, theirs in zip(*answers, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("encoder", ["deformable", "plain"])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_permuting_the_vocabulary_permutes_the_answers(layout: str, encoder: str) -> None:
    detector = small_detector(small_config(layout=layout, encoder=encoder)).eval()
    order = torch.randperm(len(TEXT))
    plain = detector(random_images(1), mask_of(1), TEXT)
    permuted = detector(random_images(1), mask_of(1), TEXT[order])
    presence = permuted.categories.presence_logits
    torch.testing.assert_close(presence, plain.categories.presence_logits[:, :, order], atol=1e-4, rtol=0)
    assert sorted(order[permuted.categories.ids[0]].tolist()) == sorted(plain.categories.ids[0].tolist())

    def answers(output: object, names: Tensor) -> list[tuple[float, ...]]:
        label = names[output.categories.ids[0]][output.slot[0]]
        rows = torch.cat([label[:, None].float(), output.logits[-1, 0, :, None], output.boxes[-1, 0]], dim=1)
        return sorted(tuple(round(x, 3) for x in row) for row in rows.tolist())

    for a, b in zip(answers(plain, torch.arange(9)), answers(permuted, order), strict=True):
        assert a == pytest.approx(b, abs=2e-3)


@torch.no_grad()
def test_other_names_do_not_change_a_categorys_presence() -> None:
    """Without self-attention among categories an answer depends on its own name alone."""
    detector = small_detector(small_config()).eval()
    all_names = detector(random_images(1), mask_of(1), TEXT).categories
    some = detector(random_images(1), mask_of(1), TEXT[:3]).categories
    torch.testing.assert_close(all_names.presence_logits[:, :, :3], some.presence_logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("encoder", ["deformable", "plain"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_parameter_gets_a_gradient_without_any_box(layout: str, encoder: str) -> None:
    from metr.losses.config import CriterionConfig
    from metr.losses.criterion import SetCriterion

    detector = small_detector(small_config(layout=layout, encoder=encoder)).train()
    targets = Targets.stack([targets_of([], [], words=9), targets_of([], [], words=9)])
    output = detector(random_images(2), mask_of(2), TEXT, targets)
    SetCriterion(CriterionConfig())(output, targets)[0].total.backward()
    silent = [name for name, p in detector.named_parameters() if p.requires_grad and p.grad is None]
    assert not silent
    assert all(p.grad.isfinite().all() for p in detector.parameters() if p.grad is not None)


def test_present_categories_always_get_slots_and_unannotated_ones_never() -> None:
    config = small_config(kept=3)
    detector = small_detector(config).train()
    target = targets_of([[0.5, 0.5, 0.2, 0.2]] * 2, [7, 2], words=9, annotated=[1, 2, 7])
    categories = detector(random_images(1), mask_of(1), TEXT, target).categories
    assert categories.ids[0].tolist() == [1, 2, 7]
    narrow = replace(target, annotated=targets_of([], [], words=9, annotated=[2, 7]).annotated)
    categories = detector(random_images(1), mask_of(1), TEXT, narrow).categories
    assert categories.ids[0][categories.valid[0]].tolist() == [2, 7]


@torch.no_grad()
def test_inference_takes_any_list_of_names() -> None:
    detector = small_detector(small_config()).eval()
    for words in (1, 2, 9):
        output = detector(random_images(1), mask_of(1), TEXT[:words])
        assert output.logits.isfinite().all()
        assert int(output.categories.ids.max()) < words


@pytest.mark.parametrize("encoder", ["deformable", "plain"])
@torch.no_grad()
def test_more_slots_than_places_and_tiny_images(encoder: str) -> None:
    detector = small_detector(small_config(number=500, ceiling=100, encoder=encoder)).eval()
    output = detector(random_images(1, 32, 32), torch.zeros(1, 32, 32, dtype=torch.bool), TEXT)
    assert output.boxes.isfinite().all()


def test_options_are_not_ignored() -> None:
    """Each option of the queries and the extraction changes the answers."""
    plain = small_config()
    others = [
        small_config(attention="image"),
        small_config(content="place"),
        plain.model_copy(update={"categories": plain.categories.model_copy(update={"self_attention": True})}),
    ]

    def answer(config: DetectorConfig) -> Tensor:
        torch.manual_seed(0)
        detector = Detector(config, TEXT.shape[1]).eval()
        with torch.no_grad():
            for parameter in detector.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
            return detector(random_images(1), mask_of(1), TEXT).logits

    base = answer(plain)
    for config in others:
        assert not torch.allclose(base, answer(config), atol=1e-5)


def test_denoising_plan_keeps_its_promises() -> None:
    detector = small_detector(small_config(denoising=30)).train()
    boxes = [[0.3, 0.3, 0.2, 0.2], [0.7, 0.6, 0.3, 0.2], [0.31, 0.3, 0.2, 0.2]]
    target = targets_of(boxes, [1, 4, 5], words=9, annotated=[1, 4, 5, 6])
    categories = detector(random_images(1), mask_of(1), TEXT, target).categories
    queries, plan = detector.denoising(target, categories)
    label = categories.ids[0][plan.slot[0]]
    own = label == target.labels[0, plan.target[0]]
    positive, valid = plan.positive[0], plan.valid[0]
    assert positive.any()
    assert own[positive].all()
    flipped = valid & ~own
    assert flipped.any()
    # boxes 0 and 2 lie on each other: neither may be shown under the other's category
    assert not ((plan.target[0] == 0) & flipped & (label == 5)).any()
    assert not ((plan.target[0] == 2) & flipped & (label == 1)).any()
    assert target.annotated[0, label[flipped]].all()
    # groups never mix categories, nor denoising with matching
    for group in queries.group[0][valid].unique():
        assert len(plan.slot[0][valid & (queries.group[0] == group)].unique()) == 1
    assert int(queries.group[0][valid].min()) >= categories.ids.shape[1]
    assert valid.sum() <= 30


@pytest.mark.parametrize("encoder", ["deformable", "plain"])
def test_denoising_does_not_change_the_other_answers(encoder: str) -> None:
    detector = small_detector(small_config(denoising=30, encoder=encoder)).eval()
    target = targets_of([[0.3, 0.3, 0.2, 0.2]], [1], words=9)
    with_it = detector(random_images(1), mask_of(1), TEXT, target)
    bare = small_detector(small_config(denoising=0, encoder=encoder)).eval()
    bare.load_state_dict(detector.state_dict(), strict=False)
    without = bare(random_images(1), mask_of(1), TEXT, target)
    torch.testing.assert_close(with_it.logits, without.logits, atol=1e-5, rtol=0)


def test_targets_move_as_one() -> None:
    target = targets_of([[0.3, 0.3, 0.2, 0.2]], [1], words=9)
    moved = target.to("meta")
    assert isinstance(moved, Targets)
    assert moved.boxes.device.type == moved.annotated.device.type == "meta"


@pytest.mark.parametrize("words", [1, 9])
@torch.no_grad()
def test_places_answer_as_if_each_category_had_queries_of_its_own(words: int) -> None:
    """What the decoder finds at a place once is what it would find for each category: the content names none."""
    places = small_config(layout="places", number=6, attention="image")
    once = small_detector(places).eval()
    text = TEXT[:words]
    output = once(random_images(2), mask_of(2), text)
    memory = once.encode(random_images(2), mask_of(2))
    features = once.proposals.features(memory, anchor_logits(memory)[1])
    queries = Queries(
        content=gather_rows(features, output.proposals.place),
        reference_boxes=output.proposals.boxes,
        slot=output.slot,
        group=output.slot,
        valid=output.valid,
    )
    decoded = once.decoder(queries, memory)
    tokens = similarity_tokens(output.categories, places.similarity)
    torch.testing.assert_close(output.boxes, decoded.boxes, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.logits, once.decoder.ask(decoded, tokens, queries.slot), atol=1e-4, rtol=0)
    assert output.slot.shape[1] == words * 6, "when detecting, every category has a slot"


def kept_positions() -> DetectorConfig:
    """The small network with the queries of Deformable DETR, and heads of their own behind the layers' norm."""
    values = adopted_config(encoder="deformable").model_dump()
    values["queries"]["content"] = "box_only"
    values["decoder"] |= {"positions": "first", "predictors": "normed_layer"}
    return DetectorConfig.model_validate(values)


@torch.no_grad()
def test_queries_keep_the_position_of_their_first_box() -> None:
    detector = small_detector(kept_positions()).eval()
    memory = detector.encode(random_images(2), mask_of(2))
    first, other = torch.rand(2, 5, 4) * 0.4 + 0.2, torch.rand(2, 5, 4) * 0.4 + 0.2
    decoder, none = detector.decoder, torch.zeros(2, 5, dtype=torch.int64)
    queries = Queries(
        content=torch.zeros(2, 5, 32), reference_boxes=first, slot=none, group=none, valid=torch.ones_like(none).bool()
    )
    content, kept = decoder._first(queries, memory)
    made = decoder.position(box_encoding(first, 32))
    torch.testing.assert_close(torch.cat([kept, content], dim=-1), made)
    assert torch.equal(decoder.placed(other, memory, kept)[0], kept), "whatever box a later layer starts from"


def test_options_of_kept_positions_that_do_not_fit() -> None:
    values = kept_positions().model_dump()
    for decoder, message in (
        ({"positions": "sine"}, "'box_only' needs decoder.positions 'first'"),
        ({"kind": "conditional"}, "'first' is for decoder.kind 'deformable'"),
        ({"kind": "distribution", "positions": "plain"}, "needs decoder.positions 'first'|'normed_layer' is for"),
    ):
        with pytest.raises(ValidationError, match=message):
            DetectorConfig.model_validate(values | {"decoder": values["decoder"] | decoder})


@pytest.mark.parametrize("form", [adopted_config, kept_positions])
def test_the_form_that_takes_over_other_detectors_learns(form: Callable[[], DetectorConfig]) -> None:
    """Classifiers, a head a layer and places: every parameter gets a gradient, objects or none."""
    from metr.losses.config import CriterionConfig
    from metr.losses.criterion import SetCriterion

    detector = small_detector(form()).train()
    objects = targets_of([[0.5, 0.5, 0.2, 0.2], [0.3, 0.3, 0.2, 0.4]], [7, 2], words=9)
    for target in (objects, targets_of([], [], words=9)):
        detector.zero_grad()
        targets = Targets.stack([target, target])
        output = detector(random_images(2), mask_of(2), TEXT, targets)
        losses, _ = SetCriterion(CriterionConfig())(output, targets)
        losses.total.backward()
        silent = [name for name, p in detector.named_parameters() if p.requires_grad and p.grad is None]
        assert not silent
    assert output.slot.shape[1] == 4 * 24, "in training as many categories as `kept`"


def test_a_network_for_weights_to_come_is_the_network() -> None:
    state = torch.random.get_rng_state()
    made, config = small_detector(), small_config()
    torch.random.set_rng_state(state)
    empty = unfilled(config, made.text_width)
    assert torch.equal(torch.random.get_rng_state(), state), "no random number is drawn"
    assert {key: value.shape for key, value in skeleton(config, made.text_width).state_dict().items()} == {
        key: value.shape for key, value in made.state_dict().items()
    }
    empty.load_state_dict(made.state_dict())
    constants = dict(made.named_buffers())
    assert constants
    for key, value in empty.named_buffers():
        assert torch.equal(value, constants[key]), key
