"""Further queries in training: where they start, that they leave the others alone, and that detection knows none."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from metr.errors import ConfigError
from metr.models.config import DetectorConfig, QueryConfig
from metr.models.detector import Detector
from metr.models.heads import similarity_tokens
from metr.models.proposals import anchor_boxes, apart, side_by_side
from metr.structures import DetectorOutput, Proposals, Targets

from small import TEXT_WIDTH, small_config, small_detector, targets_of

NAMES, FURTHER = 5, 18
IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
MASK = torch.zeros(2, 64, 64, dtype=torch.bool)
TEXT = torch.nn.functional.normalize(torch.randn(NAMES, TEXT_WIDTH, generator=torch.Generator().manual_seed(1)), dim=-1)
TARGETS = replace(
    Targets.stack(
        [
            targets_of([[0.4, 0.4, 0.2, 0.3], [0.7, 0.7, 0.2, 0.2]], [1, 3], words=NAMES, annotated=[0, 1, 3]),
            targets_of([[0.5, 0.5, 0.4, 0.4]], [2], words=NAMES, annotated=[2]),
        ]
    ),
    noise_seeds=(1, 2),
)


def config_of(number: int, **options: Any) -> DetectorConfig:
    return small_config(one_to_many={"number": number, "repeats": 3}, **{"number": 12, "ceiling": 10} | options)


def answers(detector: Detector, targets: Targets | None = TARGETS) -> DetectorOutput:
    output: DetectorOutput = detector.eval()(IMAGES, MASK, TEXT, targets)
    return output


def pairs_of(proposals: Proposals, image: int) -> set[tuple[int, int]]:
    """Slot and place of the valid proposals of an image."""
    valid = proposals.valid[image]
    return {*zip(proposals.slot[image][valid].tolist(), proposals.place[image][valid].tolist(), strict=True)}


def next_best(detector: Detector, output: DetectorOutput) -> list[list[tuple[int, int]]]:
    """The pairs (slot, place) of each image that further queries should have, name by name and best first."""
    memory, categories, config = detector.encode(IMAGES, MASK), output.categories, detector.config.queries
    proposals = output.proposals
    assert proposals is not None
    _, usable = anchor_boxes(memory)
    features = detector.proposals.features(memory, usable)
    scores = detector.proposals.scores(features, similarity_tokens(categories, detector.config.similarity))
    wanted = []
    for image in range(len(IMAGES)):
        slots = categories.valid[image].nonzero().flatten().tolist()
        taken = pairs_of(proposals, image)
        places = usable[image].nonzero().flatten().tolist()
        if config.layout == "places":
            free = [place for place in places if (slots[0], place) not in taken]
            free.sort(key=lambda place: -max(float(scores[image, place, slot]) for slot in slots))
            wanted.append([(slot, place) for slot in slots for place in free[:FURTHER]])
            continue
        each = {slot: [place for place in places if (slot, place) not in taken] for slot in slots}
        for slot, free in each.items():
            free.sort(key=lambda place: -float(scores[image, place, slot]))
        share = min(FURTHER // len(slots), config.ceiling)
        wanted.append([(slot, place) for slot, free in each.items() for place in free[:share]])
    return wanted


@pytest.mark.parametrize("layout", ["uniform", "places"])
def test_they_start_at_the_next_best_places_and_change_nothing_else(layout: str) -> None:
    detector = small_detector(config_of(FURTHER, layout=layout))
    with torch.no_grad():
        output = answers(detector)
        plain = Detector(config_of(0, layout=layout), TEXT_WIDTH)
        plain.load_state_dict(detector.state_dict())  # they bring no weights
        without = answers(plain)
        assert answers(detector, None).one_to_many is None
        assert without.one_to_many is None
        torch.testing.assert_close(answers(detector, None).logits, answers(plain, None).logits, rtol=0, atol=0)
        wanted = next_best(detector, output)
        further, _ = detector.proposals.next_best(detector.encode(IMAGES, MASK), output.categories, output.proposals)
    parts = [(output, without, output.valid), (output.denoising, without.denoising, output.denoising.plan.valid)]
    for ours, theirs, valid in parts:
        torch.testing.assert_close(ours.logits[:, valid], theirs.logits[:, valid], atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.boxes[:, valid], theirs.boxes[:, valid], atol=1e-5, rtol=0)
    for ours, theirs in zip(vars(output.proposals).values(), vars(without.proposals).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert output.one_to_many is not None
    assert output.one_to_many.repeats == 3
    assert output.one_to_many.logits.shape == (2, *further.slot.shape)
    for image, pairs in enumerate(wanted):
        valid = output.one_to_many.valid[image]
        slots, places = output.one_to_many.slot[image][valid].tolist(), further.place[image][valid].tolist()
        assert {*zip(slots, places, strict=True)} == {*pairs}
        assert len(slots) == len(pairs)


def test_the_budget_goes_on_where_the_others_end() -> None:
    """What further queries take is what one budget for both would give beyond the first, but for the floors."""
    detector = small_detector(config_of(FURTHER, layout="budget", floor=0, ceiling=30))
    with torch.no_grad():
        output = answers(detector)
        both = detector.config.queries.model_copy(update={"number": 12 + FURTHER})
        detector.proposals.config = both
        memory = detector.encode(IMAGES, MASK)
        together, _ = detector.proposals(memory, output.categories)
        detector.proposals.config = detector.config.queries
        further, _ = detector.proposals.next_best(memory, output.categories, output.proposals)
    for image in range(len(IMAGES)):
        parts = [pairs_of(each, image) for each in (output.proposals, further, together)]
        assert parts[0] | parts[1] == parts[2]
        assert not parts[0] & parts[1]


@pytest.mark.parametrize("attention", ["group", "image"])
def test_nothing_flows_between_them_and_the_others(attention: str) -> None:
    detector = small_detector(config_of(FURTHER, attention=attention)).train()
    with torch.no_grad():
        output = answers(detector)
    memory = detector.encode(IMAGES, MASK)
    further, places = detector.proposals.next_best(memory, output.categories, output.proposals)
    own_places = detector.proposals(memory, output.categories)[1]
    parts = [
        detector.class_queries(output.proposals, own_places, output.categories),
        apart(detector.class_queries(further, places, output.categories)),
        detector.denoising(TARGETS, output.categories)[0],
    ]
    parts = [replace(part, content=part.content.detach().requires_grad_()) for part in parts]
    decoded = [*detector.decoder(side_by_side(*parts), memory).split([part.slot.shape[1] for part in parts])]
    alone = detector.decoder(parts[1], memory)
    valid = parts[1].valid  # queries that are empty do see each other
    torch.testing.assert_close(decoded[1].features[:, valid], alone.features[:, valid], atol=1e-5, rtol=0)
    for own, found in enumerate(decoded):
        reached: tuple[Tensor, ...] = torch.autograd.grad(
            found.features[:, parts[own].valid].square().sum(), [part.content for part in parts], retain_graph=True
        )
        assert [bool((gradient != 0).any()) for gradient in reached] == [own == other for other in range(3)]
    groups = [{*part.group[part.valid].tolist()} for part in parts]
    assert not groups[0] & groups[1] | groups[0] & groups[2] | groups[1] & groups[2] | groups[1] & {-1}
    if attention == "group":  # of one name alone
        assert len(groups[1]) == len(groups[0]) > 1


def test_only_where_names_have_next_best_places() -> None:
    for options in ({"layout": "shared"}, {"places": "learned"}):
        with pytest.raises(ConfigError, match="takes each name's next best places"):
            QueryConfig.checked({"one_to_many": {"number": 5}, **options})
