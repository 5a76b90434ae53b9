from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_outputs import denoising_plan, image_targets, random_boxes, random_output
from torch import Tensor, distributed
from torch.nn.functional import binary_cross_entropy

from metr.boxes import cxcywh_to_xyxy, paired_giou, paired_iou
from metr.config import as_yaml
from metr.errors import ConfigError
from metr.losses.config import CriterionConfig, LossWeights
from metr.losses.criterion import SetCriterion, average_over_ranks, box_losses
from metr.losses.predictions import QueryPredictions
from metr.structures import DetectorOutput, Losses, OneToManyOutput, Targets

UNWEIGHTED = LossWeights(classification=1, l1=1, giou=1, presence=1, proposals=1, denoising=1)
KEPT = [[0, 2, 5], [1, 2]]
SLOTS = [[0, 1, 2, 0, 1, 2, 0], [0, 0, 1, -1, 1]]


def criterion(classification: str = "focal", weights: LossWeights = UNWEIGHTED) -> SetCriterion:
    return SetCriterion(CriterionConfig.checked({"classification": classification, "weights": weights}))


def small_targets() -> Targets:
    """Category 5's second object finds no free query where there is one; category 3 is kept nowhere."""
    return Targets.stack([image_targets([0, 5, 5, 3], 6, annotated=[0, 3, 5]), image_targets([2], 6)])


def small_output(denoising: bool = True) -> DetectorOutput:
    plan = denoising_plan([[(0, 0, True), (2, 2, True), (2, 0, False)], [(1, 0, True)]]) if denoising else None
    return random_output(KEPT, SLOTS, vocabulary=6, denoising=plan)


def leaves(output: DetectorOutput) -> dict[str, Tensor]:
    found = {
        "logits": output.logits,
        "boxes": output.boxes,
        "proposal logits": output.proposals.logits,
        "proposal boxes": output.proposals.boxes,
        "presence": output.categories.presence_logits,
    }
    if output.denoising is not None:
        found |= {"denoising logits": output.denoising.logits, "denoising boxes": output.denoising.boxes}
    return found


def gradients(losses: Losses, output: DetectorOutput) -> dict[str, Tensor]:
    names, tensors = zip(*leaves(output).items(), strict=True)
    return dict(zip(names, torch.autograd.grad(losses.total, tensors), strict=True))


def plain_term(kind: str, logit: Tensor, box: Tensor, wanted: Tensor | None, classification: str) -> Tensor:
    """One query's share of one term, from the definitions."""
    p = logit.detach().sigmoid()
    if kind == "classification":
        if wanted is None:
            weight = {"focal": 0.75 * p**2, "quality": 0.75 * p**2, "matchability": p**1.5}[classification]
            return weight * binary_cross_entropy(p, torch.tensor(0.0))
        iou = paired_iou(cxcywh_to_xyxy(box), cxcywh_to_xyxy(wanted)).detach()
        goal = {"focal": torch.tensor(1.0), "quality": iou, "matchability": iou**1.5}[classification]
        weight = {"focal": 0.25 * (1 - p) ** 2, "quality": iou, "matchability": torch.tensor(1.0)}[classification]
        return weight * binary_cross_entropy(p, goal)
    if wanted is None:
        return torch.tensor(0.0)
    if kind == "l1":
        return (box - wanted).abs().sum()
    return 1 - paired_giou(cxcywh_to_xyxy(box), cxcywh_to_xyxy(wanted))


@pytest.mark.parametrize("classification", ["focal", "quality", "matchability"])
def test_every_term_equals_loops_over_queries(classification: str) -> None:
    output, targets = small_output(), small_targets()
    judge = criterion(classification)
    losses, matches = judge(output, targets)
    answer = {
        (int(r), int(b), int(q)): int(m)
        for r, b, q, m in zip(matches.layer, matches.image, matches.query, matches.target, strict=True)
    }
    assert output.denoising is not None
    plan = output.denoising.plan
    layers = {"proposals": (output.proposals.logits, output.proposals.boxes)}
    layers |= {f"decoder.{r}": (output.logits[r], output.boxes[r]) for r in range(2)}
    copies = {f"denoising.{r}": (output.denoising.logits[r], output.denoising.boxes[r]) for r in range(2)}
    assert set(losses.terms) == {"presence/0", "presence/1"} | {
        f"{layer}/{kind}" for layer in layers | copies for kind in ("classification", "l1", "giou")
    }
    for index, (layer, (logits, boxes)) in enumerate((layers | copies).items()):
        for kind in ("classification", "l1", "giou"):
            total = torch.tensor(0.0)
            denoises = layer in copies
            slot, valid = (plan.slot, plan.valid) if denoises else (output.slot, output.valid)
            for b, q in valid.nonzero().tolist():
                if not targets.annotated[b, output.categories.ids[b, slot[b, q]]]:
                    continue
                if denoises:
                    target = int(plan.target[b, q]) if plan.positive[b, q] else None
                else:
                    target = answer.get((index, b, q))
                wanted = None if target is None else targets.boxes[b, target]
                total += plain_term(kind, logits[b, q], boxes[b, q].detach(), wanted, classification)
            count = 3 if denoises else 5
            torch.testing.assert_close(losses.terms[f"{layer}/{kind}"].detach(), total / count, msg=f"{layer}/{kind}")


@pytest.mark.parametrize("as_images", [True, False], ids=["nine images", "nine categories of one image"])
def test_golden_losses(shared: Path, as_images: bool) -> None:
    golden = load_file(shared / "golden" / "official_matching.safetensors")
    counts = golden["input/target_counts"].tolist()
    objects = golden["input/target_boxes_cxcywh"].split(counts)
    if as_images:
        kept, slots, shape = [[0]] * 9, [[0] * 6] * 9, (9, 6)
        images = [replace(image_targets([0] * len(boxes), 9), boxes=boxes.unsqueeze(0)) for boxes in objects]
    else:
        kept, slots, shape = [list(range(9))], [[name for name in range(9) for _ in range(6)]], (1, 54)
        labels = [name for name, count in enumerate(counts) for _ in range(count)]
        images = [replace(image_targets(labels, 9), boxes=torch.cat(objects).unsqueeze(0))]
    output = random_output(kept, slots, vocabulary=9, layers=1)
    logits, boxes = golden["input/logits"].reshape(1, *shape), golden["input/boxes_cxcywh"].reshape(1, *shape, 4)
    losses, _ = criterion()(replace(output, logits=logits, boxes=boxes), Targets.stack(images))
    found = torch.stack([losses.terms[f"decoder.0/{kind}"] for kind in ("classification", "l1", "giou")])
    expected = torch.stack([golden[f"output/loss_{kind}"] for kind in ("focal", "l1", "giou")])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_compares_each_positive_with_its_object() -> None:
    targets = Targets.stack([image_targets([0, 0, 1], 2), image_targets([1], 2)])
    target = torch.tensor([[[2, -1, 0], [-1, -1, 0]], [[-1, 1, -1], [0, -1, -1]]])
    boxes = random_boxes(2, 2, 3)
    predictions = QueryPredictions(
        logits=torch.zeros(2, 2, 3), boxes=boxes, category=torch.zeros(2, 3).long(), target=target
    )
    losses = box_losses(predictions, targets)
    l1, giou = torch.zeros(2), torch.zeros(2)
    for r, b, q in (target >= 0).nonzero().tolist():
        wanted = targets.boxes[b, target[r, b, q]]
        l1[r] += (boxes[r, b, q] - wanted).abs().sum()
        giou[r] += 1 - paired_giou(cxcywh_to_xyxy(boxes[r, b, q]), cxcywh_to_xyxy(wanted))
        torch.testing.assert_close(
            losses.iou[r, b, q], paired_iou(cxcywh_to_xyxy(boxes[r, b, q]), cxcywh_to_xyxy(wanted))
        )
    torch.testing.assert_close(losses.l1, l1)
    torch.testing.assert_close(losses.giou, giou)


@pytest.mark.parametrize("anything", [float("nan"), float("inf"), 0.0, -1e30])
def test_boxes_without_an_object_may_be_anything_and_have_no_gradient(anything: float) -> None:
    boxes = random_boxes(1, 1, 3)
    boxes[0, 0, 1] = anything
    boxes.requires_grad_()
    target = torch.tensor([[[0, -1, -1]]])
    predictions = QueryPredictions(
        logits=torch.zeros(1, 1, 3), boxes=boxes, category=torch.zeros(1, 3).long(), target=target
    )
    losses = box_losses(predictions, image_targets([0], 1))
    (gradient,) = torch.autograd.grad((losses.l1 + losses.giou).sum(), boxes)
    assert gradient[0, 0, 1:].tolist() == [[0.0] * 4] * 2
    assert gradient[0, 0, 0].abs().sum() > 0
    assert losses.iou.isfinite().all()
    assert not losses.iou.requires_grad


def test_weights_multiply_the_terms() -> None:
    output, targets = small_output(), small_targets()
    plain = criterion()(output, targets)[0].terms
    weights = LossWeights(classification=2, l1=3, giou=5, presence=7, proposals=11, denoising=13)
    weighted = criterion(weights=weights)(output, targets)[0].terms
    of = {"classification": 2, "l1": 3, "giou": 5, "proposals": 11, "denoising": 13, "decoder": 1, "presence": 7}
    for name, value in plain.items():
        layer, kind = name.split("/")
        torch.testing.assert_close(weighted[name], value * of[layer.split(".")[0]] * of.get(kind, 1), msg=name)


def test_order_of_queries_does_not_matter() -> None:
    output, targets = small_output(denoising=False), small_targets()
    order = torch.randperm(output.slot.shape[1])
    p = output.proposals
    shuffled = replace(
        output,
        logits=output.logits[..., order],
        boxes=output.boxes[:, :, order],
        slot=output.slot[:, order],
        valid=output.valid[:, order],
        proposals=replace(
            p, logits=p.logits[:, order], boxes=p.boxes[:, order], slot=p.slot[:, order], valid=p.valid[:, order]
        ),
    )
    first, second = (criterion("quality")(out, targets)[0].terms for out in (output, shuffled))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, msg=name)


@pytest.mark.parametrize("classification", ["focal", "quality", "matchability"])
@pytest.mark.parametrize("annotated", [None, []], ids=["known to be empty", "nothing known"])
def test_a_batch_without_objects_gives_finite_losses_that_reach_everything(
    classification: str, annotated: Sequence[int] | None
) -> None:
    plan = denoising_plan([[], []])
    output = random_output(KEPT, SLOTS, vocabulary=6, denoising=plan)
    targets = Targets.stack([image_targets([], 6, annotated=annotated) for _ in range(2)])
    losses, _ = criterion(classification)(output, targets)
    assert set(losses.terms) == set(criterion(classification)(small_output(), small_targets())[0].terms)
    assert losses.total.isfinite()
    found = gradients(losses, output)  # raises where a tensor is not reached
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert (found["logits"].abs().sum() > 0) == (annotated is None)
    assert found["boxes"].abs().sum() == 0


def test_one_empty_image_beside_a_full_one() -> None:
    output = small_output(denoising=False)
    targets = Targets.stack([image_targets([0, 5, 5, 3], 6, annotated=[0, 3, 5]), image_targets([], 6)])
    losses, _ = criterion()(output, targets)
    assert losses.total.isfinite()
    assert gradients(losses, output)["boxes"][:, 1].abs().sum() == 0


def further_output(repeats: int) -> OneToManyOutput:
    """Predictions of further queries for the names of `small_output`."""
    slots = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1, 0, 0, 0]])
    valid = torch.tensor([[True] * 9, [True] * 6 + [False] * 3])
    logits, boxes = torch.randn(2, 2, 9).requires_grad_(), random_boxes(2, 2, 9).requires_grad_()
    return OneToManyOutput(logits=logits, boxes=boxes, slot=slots, valid=valid, repeats=repeats)


@pytest.mark.parametrize("repeats", [1, 3, 50])
def test_further_queries_have_the_loss_of_objects_that_are_there_several_times(repeats: int) -> None:
    """As if the decoder's own queries were these, and each object stood in the image several times."""
    further, targets, judge = further_output(repeats), small_targets(), criterion("quality")
    losses, matches = judge(replace(small_output(denoising=False), one_to_many=further), targets)
    plain, _ = judge(small_output(denoising=False), targets)
    own = {name: value for name, value in losses.terms.items() if not name.startswith("one_to_many")}
    assert own.keys() == plain.terms.keys()
    assert int(matches.query.max()) < 7, "only the other queries are told of"

    boxes, labels = ([part[image] for image in range(2)] for part in (targets.boxes, targets.labels))
    many = Targets.stack(
        [
            replace(
                image_targets([], 6, annotated=annotated),
                boxes=torch.cat([each] * repeats).unsqueeze(0),
                labels=torch.cat([label] * repeats).unsqueeze(0),
            )
            for each, label, annotated in zip(boxes, labels, ([0, 3, 5], None), strict=True)
        ]
    )
    as_decoder = random_output(KEPT, [[0] * 9, [0] * 9], vocabulary=6)
    as_decoder = replace(as_decoder, logits=further.logits, boxes=further.boxes, slot=further.slot, valid=further.valid)
    expected = judge(replace(as_decoder, proposals=None), many)[0].terms
    for layer in range(2):
        for kind in ("classification", "l1", "giou"):
            found = losses.terms[f"one_to_many.{layer}/{kind}"]
            torch.testing.assert_close(found, expected[f"decoder.{layer}/{kind}"], msg=f"{layer}/{kind}")
    halved = criterion("quality", UNWEIGHTED.model_copy(update={"one_to_many": 0.5}))
    terms = halved(replace(small_output(denoising=False), one_to_many=further), targets)[0].terms
    torch.testing.assert_close(terms["one_to_many.1/l1"], losses.terms["one_to_many.1/l1"] / 2)


def test_further_queries_of_images_without_objects_say_no() -> None:
    further, targets = further_output(4), Targets.stack([image_targets([], 6) for _ in range(2)])
    losses, _ = criterion()(replace(small_output(denoising=False), one_to_many=further), targets)
    logits, boxes = torch.autograd.grad(losses.total, [further.logits, further.boxes])
    assert (logits[:, further.valid] > 0).all()
    assert (logits[:, ~further.valid] == 0).all()
    assert (boxes == 0).all()


def misses(output: DetectorOutput, targets: Targets) -> Tensor:
    """The matched queries whose boxes do not touch their objects, [r b q]."""
    found = torch.zeros_like(output.logits, dtype=torch.bool)
    _, matches = criterion("quality")(output, targets)
    for layer, image, query, target in zip(matches.layer, matches.image, matches.query, matches.target, strict=True):
        if layer > 0:  # 0 is the proposals
            box, wanted = output.boxes[layer - 1, image, query].detach(), targets.boxes[image, target]
            found[layer - 1, image, query] = paired_iou(cxcywh_to_xyxy(box), cxcywh_to_xyxy(wanted)) == 0
    return found


@pytest.mark.parametrize("classification", ["focal", "quality", "matchability"])
def test_unannotated_and_invalid_queries_have_no_gradient(classification: str) -> None:
    output, targets = small_output(denoising=False), small_targets()
    found = gradients(criterion(classification)(output, targets)[0], output)
    unannotated = torch.tensor([[False, True, False, False, True, False, False], [False] * 7])
    silent = unannotated | ~output.valid
    assert (found["logits"][:, silent] == 0).all()
    heard = found["logits"][:, ~silent] != 0
    if classification == "quality":  # the varifocal loss asks nothing of a matched query that misses its object
        heard |= misses(output, targets)[:, ~silent]
    assert heard.all()
    assert (found["proposal logits"][silent] == 0).all()
    assert (found["boxes"][:, silent] == 0).all()
    assert (found["presence"][:, 0, [1, 2, 4]] == 0).all()


def test_what_invalid_queries_say_does_not_matter() -> None:
    output, targets = small_output(denoising=False), small_targets()
    expected = criterion()(output, targets)[0].total
    spoilt = output.logits.detach().masked_fill(~output.valid, float("inf"))
    boxes = output.boxes.detach().masked_fill(~output.valid[..., None], float("nan"))
    losses, _ = criterion()(replace(output, logits=spoilt, boxes=boxes), targets)
    torch.testing.assert_close(losses.total, expected)


def test_a_crowd_silences_only_queries_of_its_category_inside_it() -> None:
    output = random_output([[0, 1]], [[0, 0, 1]], vocabulary=2, layers=1)
    boxes = torch.tensor([[0.3, 0.3, 0.1, 0.1], [0.9, 0.9, 0.1, 0.1], [0.3, 0.3, 0.1, 0.1]]).expand(1, 1, 3, 4)
    output = replace(output, boxes=boxes.clone().requires_grad_())
    targets = image_targets([], 2, ignore=[(0, (0.3, 0.3, 0.4, 0.4))])
    found = gradients(criterion()(output, targets)[0], output)
    assert (found["logits"] != 0).flatten().tolist() == [False, True, True]
    # Whether the category is there is doubtful: nothing is asked of its presence logit.
    assert (found["presence"][:, 0, 0] == 0).all()
    assert (found["presence"][:, 0, 1] > 0).all()


def test_losses_are_those_of_the_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    output, targets = random_output([[0]], [[0, 0]], vocabulary=1, layers=1), image_targets([0], 1)
    judge = criterion()
    losses, made = judge(output, targets)
    monkeypatch.setattr(judge, "match", lambda predictions, targets: made)
    torch.testing.assert_close(judge(output, targets)[0].total, losses.total)
    last = made.layer == 1
    other = replace(made, query=torch.where(last, 1 - made.query, made.query))
    monkeypatch.setattr(judge, "match", lambda predictions, targets: other)
    expected = (output.boxes[0, 0, int(other.query[last])] - targets.boxes[0, 0]).abs().sum()
    again, returned = judge(output, targets)
    torch.testing.assert_close(again.terms["decoder.0/l1"], expected)
    assert returned is other


def test_float32_under_autocast() -> None:
    output, targets = small_output(), small_targets()
    halved = replace(
        output,
        logits=output.logits.detach().bfloat16(),
        boxes=output.boxes.detach().bfloat16(),
        proposals=replace(output.proposals, logits=output.proposals.logits.detach().bfloat16()),
        categories=replace(output.categories, presence_logits=output.categories.presence_logits.detach().bfloat16()),
    )
    again = replace(
        halved,
        logits=halved.logits.float(),
        boxes=halved.boxes.float(),
        proposals=replace(halved.proposals, logits=halved.proposals.logits.float()),
        categories=replace(halved.categories, presence_logits=halved.categories.presence_logits.float()),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = criterion("quality")(halved, targets)[0].terms
    assert {value.dtype for value in found.values()} == {torch.float32}
    for name, value in criterion("quality")(again, targets)[0].terms.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)


def test_counts_are_averaged_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    output, targets = small_output(), small_targets()
    alone = criterion()(output, targets)[0].terms

    def other_rank_has(total: Tensor) -> None:
        total += torch.tensor([11.0, 1.0])  # here: 5 objects, 3 denoising copies of objects

    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce", other_rank_has)
    shared = criterion()(output, targets)[0].terms
    factor = {"proposals": 5 / 8, "decoder": 5 / 8, "denoising": 3 / 2, "presence": 1.0}
    for name, value in alone.items():
        torch.testing.assert_close(shared[name], value * factor[name.split("/")[0].split(".")[0]], msg=name)


def test_a_real_process_group_of_one_changes_nothing(tmp_path: Path) -> None:
    counts = torch.tensor([4, 0])
    expected = average_over_ranks(counts)
    assert expected.tolist() == [4.0, 1.0]
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        assert torch.equal(average_over_ranks(counts), expected)
        assert counts.tolist() == [4, 0]
    finally:
        distributed.destroy_process_group()


@pytest.mark.trains
def test_fitting_the_loss_fits_the_objects() -> None:
    targets = image_targets([0, 0, 1], 3)
    output = random_output([[0, 1, 2]], [[0] * 4 + [1] * 3 + [2] * 3], vocabulary=3, layers=1)
    raw = output.boxes.detach().logit().requires_grad_()
    steps = 300
    optimizer = torch.optim.Adam([raw, output.logits], lr=0.1)
    # Boxes of L1 swing around their objects as far as the rate is high: it falls, so that they come to rest.
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    judge = SetCriterion(CriterionConfig())
    for _ in range(steps):
        optimizer.zero_grad()
        judge(replace(output, boxes=raw.sigmoid()), targets)[0].total.backward()
        optimizer.step()
        schedule.step()
    scores, boxes = output.logits.detach().sigmoid()[0, 0], raw.detach().sigmoid()[0, 0]
    assert (scores > 0.5).sum() == 3
    best = cxcywh_to_xyxy(boxes[scores > 0.5])
    for box, label in zip(targets.boxes[0], targets.labels[0], strict=True):
        iou = paired_iou(best, cxcywh_to_xyxy(box).expand_as(best))
        assert iou.max() > 0.9
        assert output.slot[0][scores > 0.5][iou.argmax()] == label


def test_configuration_names_the_faulty_key() -> None:
    with pytest.raises(ConfigError, match="clasification"):
        CriterionConfig.checked({"clasification": "focal"})
    with pytest.raises(ConfigError, match=r"weights\.l1"):
        CriterionConfig.checked({"weights": {"l1": -1}})
    assert "ignore_coverage: 0.5" in as_yaml(CriterionConfig())
