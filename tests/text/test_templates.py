"""Sentences for a category."""

import pytest

from metr.text.encoder import TEMPLATES, phrase_of, phrases


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("white-king", "white king"),
        ("traffic_light", "traffic light"),
        ("10-of_hearts", "10 of hearts"),
        ("dining  table", "dining table"),
        ("_private_", "private"),
        ("RBC", "RBC"),
        ("-", "-"),
    ],
)
def test_identifiers_are_read_as_words(name: str, phrase: str) -> None:
    assert phrase_of(name) == phrase


def test_a_prompt_is_taken_as_written() -> None:
    assert phrase_of("x", "T-shirt with a_b") == "T-shirt with a_b"
    assert phrases("x", "red blood cell", ["{}", "a photo of a {}"]) == (
        "red blood cell",
        "a photo of a red blood cell",
    )


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("cat", "a photo of a cat"),
        ("apple", "a photo of an apple"),
        ("hourglass", "a photo of an hourglass"),
        ("unicorn", "a photo of a unicorn"),
        ("umbrella", "a photo of an umbrella"),
        ("RBC", "a photo of an RBC"),
        ("WBC", "a photo of a WBC"),
        ("x_ray", "a photo of a x ray"),
        ("the moon", "a photo of the moon"),
        ("{}", "a photo of a {}"),
        (r"\1", r"a photo of a \1"),
    ],
)
def test_articles_suit_the_phrase(name: str, sentence: str) -> None:
    assert phrases(name, None, ["a photo of a {}"]) == (sentence,)
    assert phrases(name, None, ["a photo of an {}"]) == (sentence,)
    assert phrases(name, None, ["see: {}"]) == (f"see: {phrase_of(name)}",)


def test_every_template_has_one_place() -> None:
    assert all(template.count("{}") == 1 for template in TEMPLATES)
    assert len(set(phrases("cat"))) == len(TEMPLATES)
