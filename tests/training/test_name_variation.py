"""Other words for names in training: which, how often, and what is known of words for what is never there."""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from metr.checkpoint import load_checkpoint, words_of
from metr.data.config import AugmentationConfig, ResizeConfig
from metr.data.dataset import Example
from metr.data.dataset_config import DatasetConfig
from metr.data.datasets_file import DatasetSource
from metr.data.joint import open_joint
from metr.data.sampling import SampleKey
from metr.errors import DataError, MetrError
from metr.model import METR
from metr.structures import Batch, Targets
from metr.text.vocabulary import Vocabulary
from metr.training.config import LoopConfig, NameVariationConfig, load_recipe
from metr.training.name_variation import NameVariation, OtherWords, other_words
from metr.training.step_targets import StepTargets
from metr.training.train import train

from small import targets_of
from tiny import NAMES, TinyRun

VOCABULARY = Vocabulary.of(["cell", "cone", "cube", "fish"])
BLOOD = {"cell": ("blood cell", "corpuscle"), "fish": ("trout",)}
TEXT = torch.eye(8)


def source(name: str, categories: str, **words: Any) -> DatasetSource:
    config = DatasetConfig.model_validate({"name": name, "path": name, **words})
    return DatasetSource(
        name=name, format="coco", root=Path(name), config=config, categories=tuple(categories.split()), splits={}
    )


def embed(words: Vocabulary) -> Tensor:
    """Words in their order after the vocabulary's four names."""
    return TEXT[len(VOCABULARY) : len(VOCABULARY) + len(words)]


def words() -> OtherWords:
    sources = (source("blood", "cell fish", synonyms=BLOOD), source("blocks", "cone cube", absent=("ball", "fish")))
    found = other_words(sources, VOCABULARY, embed)
    assert found is not None
    return found


def variation(seed: int = 0, **options: float) -> NameVariation:
    config = NameVariationConfig.model_validate({"noise": 0.0, "synonyms": 0.0, "absent": 0} | options)
    return NameVariation(TEXT[:4], words(), config, seed)


def test_words_are_read_and_known_by_dataset() -> None:
    found = words()
    assert found.meant.tolist() == [0, 0, 3]
    assert torch.equal(found.synonyms, TEXT[4:7])
    assert torch.equal(found.absent, TEXT[7:8])
    assert {name: known.tolist() for name, known in found.absent_from.items()} == {"blood": [False], "blocks": [True]}
    for known in ({}, {"absent": ("cone",)}):
        assert other_words((source("blood", "cell", **known),), VOCABULARY, embed) is None, "the data knows of names"


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({"cell": ("cube",)}, {}, "blood: `synonyms` has 'cube' for 'cell', which is a category of another dataset"),
        (
            {"cell": ("a thing",)},
            {"cube": ("a thing ",)},
            "blocks: `synonyms` has 'a thing' for 'cube', which means 'cell' in another dataset",
        ),
    ],
)
def test_words_that_contradict_other_datasets_are_refused(first: Any, second: Any, said: str) -> None:
    sources = (source("blood", "cell fish", synonyms=first), source("blocks", "cone cube", synonyms=second))
    with pytest.raises(DataError) as error:
        other_words(sources, VOCABULARY, embed)
    assert said in str(error.value)
    assert "try: take it out, or make one category of two names with `renames`" in str(error.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"synonyms": {"fish": ["frog"]}}, "`synonyms` has 'frog' for 'fish', which is a category"),
        ({"synonyms": {"fish": ["a", "a "], "frog": ["a"]}}, "`synonyms` has 'a' for 'frog', which means 'fish' too"),
        ({"synonyms": {"Fish": ["trout"]}}, "`synonyms` names 'Fish', which is no category of this dataset"),
        ({"absent": ["fish"]}, "`absent` has 'fish', which is a category of this dataset"),
        (
            {"synonyms": {"fish": ["trout"]}, "absent": [" trout"]},
            "`absent` has 'trout', which is a synonym of 'fish' of this dataset",
        ),
        ({"synonyms": {"fish": "trout"}}, "'synonyms.fish': expected a list, as [this, that], found 'trout'"),
        ({"absent": "ostrich"}, "'absent': expected a list, as [this, that], found 'ostrich'"),
        ({"absent": [" "]}, "'absent.0': string should have at least 1 character"),
    ],
)
def test_words_that_contradict_their_own_dataset_are_told_as_soon_as_it_is_opened(
    tiny_run: TinyRun, tmp_path: Path, words: Any, said: str
) -> None:
    file = tmp_path / "data.yaml"
    file.write_text(json.dumps({"datasets": [{"path": str(tiny_run.datasets[0]), **words}]}))
    with pytest.raises(MetrError) as error:
        open_joint([str(file)])
    assert said in str(error.value)


def test_names_of_other_datasets_are_absent_in_the_data_itself(tiny_run: TinyRun, tmp_path: Path) -> None:
    file = tmp_path / "data.yaml"
    pond = {"name": "pond", "path": str(tiny_run.datasets[0]), "absent": ["cup", "ostrich"]}
    file.write_text(json.dumps({"datasets": [pond, str(tiny_run.datasets[1])]}))
    joint = open_joint([str(file)])
    cup, book = (joint.vocabulary.index_of(name) for name in ("cup", "book"))
    training, _ = joint.training(AugmentationConfig(resize=ResizeConfig(size=64)), "pseudo_label")
    example = training.sample(SampleKey(number=0, dataset=0, index=0, seed=1))
    assert isinstance(example, Example)
    assert example.targets.absent[0, [cup, book]].tolist() == [True, False]
    # so no pseudo-label of a name that is known to be absent is added
    assert joint.unannotated()["pond"][[cup, book]].tolist() == [False, True]


def test_names_are_called_by_synonyms_as_often_as_asked() -> None:
    every, half = variation(synonyms=1.0), variation(synonyms=0.5)
    called = Counter[tuple[int, ...]]()
    for first in range(600):
        rows = tuple(every.named(first).argmax(1).tolist())
        assert rows[0] in (4, 5)
        assert rows[1:] == (1, 2, 6), "names without synonyms stay, one with a single one has it"
        called[rows] += 1
        assert torch.equal(half.named(first), half.named(first)), "a step that is repeated is the same"
    assert 250 < called[4, 1, 2, 6] < 350
    kept = sum(int(half.named(first)[0].argmax()) == 0 for first in range(600))
    assert 250 < kept < 350
    assert not torch.equal(variation(1, synonyms=0.5).named(3), half.named(3)) or not torch.equal(
        variation(1, synonyms=0.5).named(4), half.named(4)
    )


def test_noise_turns_an_embedding_by_a_known_angle() -> None:
    text = torch.nn.functional.normalize(torch.randn(50, 384, generator=torch.Generator().manual_seed(0)), dim=-1)
    config = NameVariationConfig(noise=0.5)
    noisy = NameVariation(text, None, config, 0).named(7)
    torch.testing.assert_close(noisy.norm(dim=1), torch.ones(50))
    # the angle of a right triangle whose other side is the noise
    torch.testing.assert_close((noisy * text).sum(1), torch.full((50,), 1 / 1.25**0.5), atol=0.06, rtol=0)


def batch(targets: Targets, *datasets: str) -> Batch:
    side = torch.zeros(len(datasets), 8, 8, dtype=torch.bool)
    return Batch(
        images=torch.zeros(len(datasets), 3, 8, 8),
        padding_mask=side,
        targets=targets,
        datasets=datasets,
        image_ids=tuple(map(str, range(len(datasets)))),
        original_sizes=((8, 8),) * len(datasets),
        sizes=((8, 8),) * len(datasets),
    )


def test_absent_words_are_asked_for_and_known_where_the_dataset_says_so() -> None:
    box = [0.5, 0.5, 0.2, 0.2]
    blood = targets_of([box], [3], words=4, annotated=[0, 3])
    blocks = targets_of([box, box], [1, 2], words=4, annotated=[1, 2])
    targets = Targets.stack([blood, blocks])
    for limit in (0, 3):
        steps = StepTargets(TEXT[:4], LoopConfig(vocabulary_sample=limit), None, variation=variation(absent=5))
        text, asked = steps(batch(targets, "blood", "blocks"), None, 0)
        assert len(text) == (limit or 4) + 1
        assert torch.equal(text[-1], TEXT[7])
        assert asked.annotated[:, -1].tolist() == [False, True]
        assert asked.absent[:, -1].tolist() == [False, True]
        assert not asked.assumed_negative.any()
        assert [text[label].argmax().item() for label in asked.labels[asked.is_object]] == [3, 1, 2]
        assert torch.equal(asked.boxes, targets.boxes)
    without = StepTargets(TEXT[:4], LoopConfig(), None, variation=variation(absent=0))
    text, asked = without(batch(targets, "blood", "blocks"), None, 0)
    assert torch.equal(text, TEXT[:4])
    assert torch.equal(asked.annotated, targets.annotated)
    nothing = NameVariation(TEXT[:4], None, NameVariationConfig(), 0)
    assert StepTargets(TEXT[:4], LoopConfig(), None, variation=nothing).variation is None


def test_a_run_is_trained_by_its_words_and_knows_them_afterwards(
    tiny_run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, names = tiny_run.datasets[0], NAMES["pond"]
    given = {"name": "pond", "path": str(path), "synonyms": {names[0]: ["gill bearer"]}, "absent": ["ostrich"]}
    file = tmp_path / "data.yaml"
    file.write_text(json.dumps({"datasets": [given]}))
    asked: list[int] = []
    original = StepTargets.__call__

    def seen(self: StepTargets, *arguments: Any) -> Any:
        text, targets = original(self, *arguments)
        asked.append(len(text))
        return text, targets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepTargets, "__call__", seen)
        steps = ["train.loop.steps=2", "train.loop.images=false", "train.loop.curves=false"]
        train([str(file)], tmp_path / "run", load_recipe("nano", tiny_run.recipe, steps))
    assert asked == [len(names) + 1] * 2
    checkpoint = load_checkpoint(tmp_path / "run/last")
    assert len(checkpoint.text_embeddings) == len(names), "other words are no names"
    assert words_of(checkpoint.training).synonyms == {"gill bearer"}
    model = METR.from_pretrained(tmp_path / "run/last", device="cpu")
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        model.embed(["gill bearer"])
        assert "not trained" not in caplog.text
        model.embed(["ostrich"])
        assert '"ostrich" was not trained' in caplog.text


def test_words_of_earlier_training_count() -> None:
    earlier = {"data": {"pond": {"renames": {"Frog": "frog"}, "synonyms": {"frog": ["toad "]}}}}
    later = {"data": {"sea": {"synonyms": {"fish": ["trout"]}}}, "finetuned_from": earlier}
    found = words_of(later)
    assert found.synonyms == {"toad", "trout"}
    assert found.renames == {"Frog": ("frog",)}
    assert words_of({"data": {"sea": {"synonyms": 3, "renames": None}, "pond": 4}}).synonyms == frozenset()
