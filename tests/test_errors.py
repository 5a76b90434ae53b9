"""Messages for people."""

import copy

import pytest

from metr.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DependencyError,
    MetrError,
    ModelError,
    counted,
    did_you_mean,
)

KINDS = [CheckpointError, ConfigError, DataError, DependencyError, ModelError]


@pytest.mark.parametrize(
    ("where", "hint", "text"),
    [
        (None, None, "expected 3 boxes, found 2"),
        ("a.json", None, "a.json: expected 3 boxes, found 2"),
        (None, "count again", "expected 3 boxes, found 2\n  try: count again"),
        ("a.json", "count again", "a.json: expected 3 boxes, found 2\n  try: count again"),
        (0, None, "0: expected 3 boxes, found 2"),
    ],
)
def test_the_message_says_where_what_and_what_to_try(where: object, hint: str | None, text: str) -> None:
    error = MetrError("expected 3 boxes, found 2", where=where, hint=hint)
    assert str(error) == text
    assert error.args == (text,)
    assert (error.what, error.where, error.hint) == ("expected 3 boxes, found 2", where, hint)


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_is_a_metr_error(kind: type[MetrError]) -> None:
    with pytest.raises(MetrError, match="here: what"):
        raise kind("what", where="here")


def test_a_copy_says_the_same() -> None:
    """Errors travel between processes the way they are copied; the message must not be built twice."""
    error = DataError("broken", where="a.jpg", hint="delete it")
    again = copy.copy(error)
    assert str(again) == str(error)
    assert (again.what, again.where, again.hint) == ("broken", "a.jpg", "delete it")


@pytest.mark.parametrize(
    ("number", "words", "text"),
    [
        (1, ("image",), "1 image"),
        (0, ("image",), "0 images"),
        (2_000, ("box", "boxes"), "2,000 boxes"),
        (1, ("box", "boxes"), "1 box"),
        (1.0, ("epoch",), "1 epoch"),
        (0.5, ("epoch",), "0.5 epochs"),
        (13_333.3, ("epoch",), "13,333.3 epochs"),
    ],
)
def test_numbers_of_things(number: float, words: tuple[str, ...], text: str) -> None:
    assert counted(number, *words) == text


def test_a_near_word_is_named_first() -> None:
    assert did_you_mean("widht", ["depth", "width", "heads"]) == "did you mean 'width'?"
    assert did_you_mean("learning_rat", ["learning_rate", "learning_rates"]).startswith("did you mean 'learning_rate'")


def test_without_a_near_word_all_are_named_in_order() -> None:
    assert did_you_mean("zzz", ["width", "depth"]) == "one of 'depth', 'width'"


def test_words_may_come_from_any_iterable() -> None:
    assert did_you_mean("widht", iter({"width": 1, "depth": 2})) == "did you mean 'width'?"
