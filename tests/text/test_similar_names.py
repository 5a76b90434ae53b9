"""Names that are spelt alike, against cases worked out by hand."""

import pytest
import torch

from metr.text.config import TextEncoderConfig
from metr.text.similar_names import embed_names, has_head, read_alike, spelling_matches, words
from metr.text.vocabulary import Vocabulary


def test_words_of_a_name() -> None:
    for name in ("White_King", "white-king", "whiteKing", " white  king", "WHITE KING"):
        assert words(name) == ("white", "king"), name
    assert words("TVMonitor") == ("tv", "monitor")
    assert words("Peatón") == ("peaton",)
    assert words("пятно") == ("пятно",)


@pytest.mark.parametrize(
    ("one", "two", "why"),
    [
        ("Car", "car", "the same but"),
        ("dining table", "diningtable", "the same but"),
        ("hard-hat", "hard_hat", "the same but"),
        ("platelet", "Platelets", "plural"),
        ("bus", "buses", "plural"),
        ("berry", "berries", "plural"),
        ("RBC", "red blood cell", "abbreviation"),
        ("PVCs", "poly vinyl chloride", "abbreviation"),
        ("elehpant", "elephant", "one letter"),
        ("persn", "person", None),  # five letters: too short
        ("person", "persson", "one letter"),
        ("licence plate", "license plate", "one letter"),
        ("cat", "car", None),
        ("c", "C", None),  # perhaps two signs
        ("x", "x-", None),
        ("tv", "TV", "the same but"),
        ("horse", "house", None),
        ("weight", "height", None),  # slips rarely hit the first letter
        ("class 1", "class 2", None),
        ("bus", "busy street", None),
        ("cap", "cape", None),
        ("cat", "car and truck", None),  # no capitals, no abbreviation
        ("with helmet", "without helmet", None),
    ],
)
def test_spelt_alike(one: str, two: str, why: str | None) -> None:
    for names in ((one, two), (two, one)):
        found = spelling_matches(names)
        if why is None:
            assert found == ()
        else:
            (pair,) = found
            assert (pair.first, pair.second) == names
            assert why in pair.why
            assert pair.abbreviation == (why == "abbreviation")


def test_heads() -> None:
    assert has_head("white-king", "king")
    assert has_head("hot dog", "dogs")
    assert has_head("traffic lights", "light")
    assert not has_head("kingfisher", "king")
    assert not has_head("king of hearts", "king")
    assert not has_head("king", "king")
    assert not has_head("stone white-king", "white king")


def test_names_that_the_language_model_does_not_tell_apart() -> None:
    names = ("a", "cat", "A", "螺丝", "x", "螺母", "Cat", "x-", "垫圈")
    vectors = embed_names(Vocabulary.of(names), TextEncoderConfig()).vectors
    assert read_alike(names, vectors) == (("a", "A"), ("cat", "Cat"), ("螺丝", "螺母", "垫圈"))
    assert read_alike((), torch.zeros(0, 4)) == ()
    many = tuple(str(number) for number in range(600))
    rows = torch.eye(600)
    rows[599] = rows[3]
    assert read_alike(many, rows) == (("3", "599"),)
