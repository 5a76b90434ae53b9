"""Shortlisting before category extraction: what it may change, and what not."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from metr.errors import ConfigError
from metr.losses.classification import presence_losses
from metr.losses.config import CriterionConfig
from metr.losses.criterion import SetCriterion
from metr.models.category_extraction import ProjectedText
from metr.models.category_selection import Shortlist, Shortlisted
from metr.models.config import DetectorConfig
from metr.models.detector import Detector
from metr.structures import DetectorOutput, Targets

from small import SEED, small_config, small_detector, targets_of

WORDS, SHORT = 40, 10
TEXT = torch.nn.functional.normalize(torch.randn(WORDS, 24, generator=torch.Generator().manual_seed(1)), dim=-1)


def config_of(shortlist: int = SHORT, **values: object) -> DetectorConfig:
    plain = small_config(**values)
    return plain.model_copy(update={"categories": plain.categories.model_copy(update={"shortlist": shortlist})})


def detector_of(shortlist: int = SHORT, **values: object) -> Detector:
    return small_detector(config_of(shortlist, **values)).eval()


def without_shortlist(detector: Detector) -> Detector:
    """The same weights, and every name looked at."""
    plain = copy.deepcopy(detector)
    plain.category_extraction.shortlist = None
    return plain


def random_images(number: int = 1, seed: int = 2) -> Tensor:
    return torch.rand(number, 3, 64, 96, generator=torch.Generator().manual_seed(seed))


def ask(
    detector: Detector, images: Tensor, text: Tensor | ProjectedText = TEXT, targets: Targets | None = None
) -> DetectorOutput:
    return detector(images, torch.zeros(len(images), 64, 96, dtype=torch.bool), text, targets)


def test_logits_are_the_soft_maximum_over_the_summaries() -> None:
    detector = detector_of()
    memory = detector.encoder(detector.backbone(random_images(2)), torch.zeros(2, 64, 96, dtype=torch.bool))
    module = detector.category_extraction.shortlist
    assert isinstance(module, Shortlist)
    projected = detector.project(TEXT).tokens
    logits, rows = module(memory, projected)
    for image in range(2):
        query = module.queries.weight.unsqueeze(0)
        seen = module.attention(query, memory.tokens[image : image + 1], memory.tokens[image : image + 1])
        summaries = module.summary(module.feed_forward(module.norm(seen)))[0]
        each = torch.stack([summaries @ name for name in projected]) / 32**0.5
        expected = each.exp().mean(1).log() + module.bias
        torch.testing.assert_close(logits[image], expected, atol=1e-4, rtol=1e-4)
        assert rows[image].tolist() == sorted(expected.topk(SHORT).indices.tolist())


@torch.no_grad()
@pytest.mark.parametrize("layout", ["budget", "uniform", "shared"])
def test_no_more_names_than_the_shortlist_takes_is_no_shortlist(layout: str) -> None:
    detector = detector_of(shortlist=WORDS, layout=layout)
    ours, plain = ask(detector, random_images(2)), ask(without_shortlist(detector), random_images(2))
    assert ours.categories.shortlist is None
    assert ours.categories.shortlist_logits is None
    assert torch.equal(ours.logits, plain.logits)
    assert torch.equal(ours.boxes, plain.boxes)
    assert torch.equal(ours.categories.presence_logits, plain.categories.presence_logits)


@torch.no_grad()
def test_shortlisted_names_get_the_answers_of_all_names() -> None:
    """Category extraction without self-attention: what is looked at is answered as if everything were."""
    detector = detector_of()
    ours = ask(detector, random_images(3)).categories
    everything = ask(without_shortlist(detector), random_images(3)).categories
    assert ours.shortlist is not None
    assert ours.shortlist.shape == (3, SHORT)
    for image, rows in enumerate(ours.shortlist):
        assert (rows.diff() > 0).all()
        looked = torch.zeros(WORDS, dtype=torch.bool)
        looked[rows] = True
        presence, expected = ours.presence_logits[:, image], everything.presence_logits[:, image]
        torch.testing.assert_close(presence[:, looked], expected[:, looked], atol=1e-5, rtol=1e-5)
        assert (presence[:, ~looked] == -torch.inf).all()
        torch.testing.assert_close(ours.tokens[image], everything.tokens[image, rows], atol=1e-5, rtol=1e-5)
        # kept are the most likely of those that were looked at, and their tokens are theirs
        best = expected[-1].masked_fill(~looked, -torch.inf).topk(4).indices
        assert ours.ids[image].tolist() == sorted(best.tolist())
        torch.testing.assert_close(
            ours.kept_tokens[image], everything.tokens[image, ours.ids[image]], atol=1e-5, rtol=1e-5
        )


@torch.no_grad()
def test_where_the_kept_are_shortlisted_detection_is_that_of_all_names() -> None:
    detector = detector_of(shortlist=30)
    plain = ask(without_shortlist(detector), random_images())
    kept = plain.categories.ids[0]
    order = torch.cat([kept, torch.tensor([v for v in range(WORDS) if v not in kept.tolist()])])
    # a shortlist that agrees with category extraction: the kept names first
    module = detector.category_extraction.shortlist
    assert isinstance(module, Shortlist)

    def likes_the_kept(_module: object, _inputs: object, _output: object) -> Shortlisted:
        return Shortlisted(torch.zeros(1, WORDS), order[:30].sort().values.unsqueeze(0))

    module.register_forward_hook(likes_the_kept)
    ours = ask(detector, random_images())
    assert ours.categories.ids.tolist() == plain.categories.ids.tolist()
    torch.testing.assert_close(ours.logits, plain.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.boxes, plain.boxes, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["budget", "uniform", "shared"])
def test_an_image_has_a_shortlist_of_its_own(layout: str) -> None:
    """[A, B] gives what A and B alone give."""
    detector = detector_of(layout=layout)
    _spread_out(detector)
    images = random_images(3)
    images[1] = images[1].square()
    images[2] *= 0.05
    together = ask(detector, images)
    rows = together.categories.shortlist
    assert rows is not None
    assert len({tuple(image) for image in rows.tolist()}) > 1
    for image in range(3):
        alone = ask(detector, images[image : image + 1])
        assert alone.categories.shortlist is not None
        assert torch.equal(alone.categories.shortlist[0], rows[image])
        assert torch.equal(alone.categories.ids[0], together.categories.ids[image])
        torch.testing.assert_close(alone.logits[:, 0], together.logits[:, image], atol=1e-4, rtol=0)
        torch.testing.assert_close(alone.boxes[:, 0], together.boxes[:, image], atol=1e-4, rtol=0)


@torch.no_grad()
def test_permuting_the_vocabulary_permutes_the_shortlist_and_the_answers() -> None:
    detector = detector_of()
    order = torch.randperm(WORDS)
    plain, permuted = ask(detector, random_images()), ask(detector, random_images(), TEXT[order])
    ours, theirs = plain.categories, permuted.categories
    assert ours.shortlist is not None
    assert theirs.shortlist is not None
    assert sorted(order[theirs.shortlist[0]].tolist()) == ours.shortlist[0].tolist()
    torch.testing.assert_close(theirs.presence_logits, ours.presence_logits[:, :, order], atol=1e-4, rtol=0)
    assert sorted(order[theirs.ids[0]].tolist()) == ours.ids[0].tolist()

    def answers(output: DetectorOutput, names: Tensor) -> list[tuple[float, ...]]:
        label = names[output.categories.ids[0]][output.slot[0]]
        rows = torch.cat([label[:, None].float(), output.logits[-1, 0, :, None], output.boxes[-1, 0]], dim=1)
        return sorted(tuple(round(x, 3) for x in row) for row in rows.tolist())

    for a, b in zip(answers(plain, torch.arange(WORDS)), answers(permuted, order), strict=True):
        assert a == pytest.approx(b, abs=2e-3)


def test_present_names_are_shortlisted_in_training_and_unknown_ones_last() -> None:
    detector = detector_of(shortlist=6, kept=3).train()
    with torch.no_grad():
        likely = ask(detector.eval(), random_images()).categories.shortlist_logits
    assert likely is not None
    unlikely = likely[0].argsort()[:2].tolist()
    asked = [*unlikely, *likely[0].argsort()[10:13].tolist()]
    target = targets_of([[0.5, 0.5, 0.2, 0.2]] * 2, unlikely, words=WORDS, annotated=asked)
    found = ask(detector.train(), random_images(), TEXT, target).categories
    assert found.shortlist is not None
    assert {*asked} <= {*found.shortlist[0].tolist()}
    assert {*unlikely} <= {*found.ids[0][found.valid[0]].tolist()} <= {*asked}
    # more that are assumed to be absent than there is room for: present and then the likeliest of what is asked
    assumed = ~target.annotated
    found = ask(detector, random_images(), TEXT, replace(target, assumed_negative=assumed)).categories
    assert found.shortlist is not None
    others = likely[0].clone()
    others[unlikely] = -torch.inf
    assert found.shortlist[0].tolist() == sorted([*unlikely, *others.topk(4).indices.tolist()])


@pytest.mark.parametrize("words", [5, WORDS])
def test_every_parameter_gets_a_gradient_without_any_box(words: int) -> None:
    """With fewer names than the shortlist takes, and with more."""
    detector = detector_of().train()
    targets = Targets.stack([targets_of([], [], words=words)] * 2)
    output = ask(detector, random_images(2), TEXT[:words], targets)
    losses, _ = SetCriterion(CriterionConfig())(output, targets)
    assert losses.total.isfinite()
    losses.total.backward()
    silent = [name for name, p in detector.named_parameters() if p.requires_grad and p.grad is None]
    assert not silent
    assert all(p.grad.isfinite().all() for p in detector.parameters() if p.grad is not None)
    module = detector.category_extraction.shortlist
    assert isinstance(module, Shortlist)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (module.queries.weight, module.bias))


def test_the_loss_is_that_of_presence_on_what_is_asked() -> None:
    detector = detector_of().train()
    target = targets_of([[0.5, 0.5, 0.2, 0.2]], [3], words=WORDS, annotated=[1, 3, 5, 7])
    output = ask(detector, random_images(), TEXT, target)
    logits = output.categories.shortlist_logits
    assert logits is not None
    logits.retain_grad()
    term = SetCriterion(CriterionConfig())(output, target)[0].terms["presence/shortlist"]
    absent = logits[0, [1, 5, 7]].sigmoid()
    expected = -logits[0, 3].sigmoid().log() - (absent**2 * (1 - absent).log()).sum()
    torch.testing.assert_close(term, expected)
    term.backward()
    assert logits.grad is not None
    assert logits.grad[0].nonzero().flatten().tolist() == [1, 3, 5, 7]


def test_names_that_were_not_looked_at_give_no_loss_to_category_extraction() -> None:
    detector = detector_of().train()
    target = targets_of([[0.5, 0.5, 0.2, 0.2]], [3], words=WORDS)
    output = ask(detector, random_images(), TEXT, target)
    rows = output.categories.shortlist
    assert rows is not None
    term = SetCriterion(CriterionConfig())(output, target)[0].terms["presence/1"]
    logits = output.categories.presence_logits[1, 0, rows[0]].detach()
    here = rows[0] == 3
    expected = -logits[here].sigmoid().log().sum() - (logits.sigmoid() ** 2 * (1 - logits.sigmoid()).log())[~here].sum()
    torch.testing.assert_close(term, expected)


def test_logits_are_float32_under_autocast() -> None:
    detector = detector_of()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        found = ask(detector, random_images())
    assert found.categories.shortlist_logits is not None
    assert found.categories.shortlist_logits.dtype == torch.float32
    assert found.logits.isfinite().all()


def test_without_the_option_there_is_nothing_of_it() -> None:
    assert not [name for name in detector_of(shortlist=0).state_dict() if "shortlist" in name]
    assert config_of(shortlist=0) == small_config()


def test_a_shortlist_smaller_than_the_kept_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"shortlist 3 is below .*kept 20"):
        DetectorConfig.checked({"categories": {"shortlist": 3}})


@pytest.mark.trains
def test_it_learns_which_names_are_shown() -> None:
    """Four images with a colour and a name each; from what the encoder says of them, it learns to put it first."""
    detector = detector_of(denoising=0)
    colours = torch.tensor([[1.0, 0.1, 0.1], [0.1, 1.0, 0.1], [0.1, 0.1, 1.0], [0.9, 0.9, 0.2]])
    images, labels = 0.2 * random_images(4, SEED + 2) + 0.8 * colours[:, :, None, None], [3, 11, 22, 33]
    with torch.no_grad():
        memory = detector.encoder(detector.backbone(images), torch.zeros(4, 64, 96, dtype=torch.bool))
    targets = Targets.stack([targets_of([[0.5, 0.5, 0.4, 0.4]], [label], words=WORDS) for label in labels])
    extraction = detector.category_extraction
    assert isinstance(extraction.shortlist, Shortlist)
    optimizer = torch.optim.Adam(extraction.parameters(), lr=3e-3)
    for _ in range(100):
        logits, _ = extraction.shortlist(memory, extraction.norm(extraction.projection(TEXT)))
        optimizer.zero_grad()
        presence_losses(logits.unsqueeze(0), targets, CriterionConfig()).sum().backward()
        optimizer.step()
    with torch.no_grad():
        found = extraction(memory, TEXT)
    assert found.shortlist is not None
    assert all(label in rows for label, rows in zip(labels, found.shortlist.tolist(), strict=True))
    assert found.shortlist_logits is not None
    assert found.shortlist_logits.argmax(1).tolist() == labels


def test_projected_text_gives_the_same_answers_until_something_changes() -> None:
    detector = detector_of()
    with torch.no_grad():
        first = detector.project(TEXT)
        assert detector.project(TEXT, first) is first
        plain, ahead = ask(detector, random_images()), ask(detector, random_images(), first)
        assert torch.equal(plain.logits, ahead.logits)
        assert torch.equal(plain.categories.presence_logits, ahead.categories.presence_logits)
        # another text, another precision, other weights
        assert detector.project(TEXT.clone(), first) is not first
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert detector.project(TEXT, first) is not first
        detector.category_extraction.projection.weight.data.mul_(1.01)
        again = detector.project(TEXT, first)
        assert again is not first
        assert torch.equal(ask(detector, random_images(), again).logits, ask(detector, random_images()).logits)


def _spread_out(detector: Detector) -> None:
    """Makes what an image shows matter more than what the shortlist says of any."""
    module = detector.category_extraction.shortlist
    assert isinstance(module, Shortlist)
    with torch.no_grad():
        for layer in (module.attention.value, module.attention.out):
            layer.bias.zero_()
        module.attention.value.weight.mul_(30)
