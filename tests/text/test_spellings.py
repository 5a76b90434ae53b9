"""Which names may be asked for together: capital letters make no other name, unless training had both spellings."""

import pytest

from metr.errors import ConfigError
from metr.text.same_names import asked_names

TRAINED = ("RBC", "bottle", "Bottle", "traffic light")


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["rbc", "RBC"], "'rbc', 'RBC'"),
        (["Rbc", "cat", "rbc"], "'Rbc', 'rbc'"),
        (["Unicorn", "unicorn "], "'Unicorn', 'unicorn'"),
        (["bottle", "BOTTLE", "Bottle"], "'bottle', 'BOTTLE', 'Bottle'"),
        (["BOTTLE", "bottle"], "'BOTTLE', 'bottle'"),
        ({"rbc": ["a red cell"], "RBC": ["a blood cell"]}, "'rbc', 'RBC'"),
        (["RBC", "RBC"], "'RBC'"),
    ],
)
def test_one_name_in_two_spellings_is_given_twice(names: list[str] | dict[str, list[str]], told: str) -> None:
    with pytest.raises(ConfigError, match=f"^categories: given twice: {told}(;|\n)(.|\n)*try: give each name once"):
        asked_names(names, TRAINED)


@pytest.mark.parametrize("names", [["bottle", "Bottle"], ["rbc"], ["Unicorn", "RBC"], list(TRAINED)])
def test_names_that_are_not_the_same(names: list[str]) -> None:
    assert asked_names(names, TRAINED).names == tuple(names)
