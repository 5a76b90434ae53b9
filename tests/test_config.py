"""Configuration: merging, overriding, and messages that name the key."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import Field, ValidationError, model_validator

from metr.config import OTHERS_WORDS, Config, as_yaml, differences, leaves, merge, parse_overrides, read_yaml
from metr.errors import ConfigError
from metr.inference.config import inference_config
from metr.training.config import OptimizerConfig, RunConfig, load_recipe


class Part(Config):
    """A part of a machine."""

    width: int = Field(32, ge=1)
    heads: int = 4
    rate: float = 1e-3
    kind: Literal["round", "square"] = "round"

    @model_validator(mode="after")
    def _fits(self) -> "Part":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by {self.heads} heads")
        return self


class Machine(Config):
    """Parts in every way that configurations nest."""

    name: str = "nano"
    part: Part = Part()
    spare: Part | None = None
    row: tuple[Part, ...] = ()
    named: dict[str, Part] = Field(default_factory=dict)
    sizes: tuple[int, ...] = (1, 2)
    mixed: Literal["all", "none"] | dict[str, Annotated[float, Field(ge=0)]] = "all"
    either: dict[str, tuple[str, ...] | str] | None = None
    listed: tuple[Part | int, ...] = ()

    @model_validator(mode="after")
    def _has_sizes(self) -> "Machine":
        if not self.sizes:
            raise ValueError("a machine needs a size")
        return self


def message(values: dict[str, Any], where: object = None) -> str:
    with pytest.raises(ConfigError) as error:
        Machine.checked(values, where=where)
    return str(error.value)


def test_plain_values_become_a_configuration() -> None:
    machine = Machine.checked({"part": {"width": 64, "rate": "1e-4"}, "row": [{"width": 8}], "sizes": [3]})
    assert machine.part == Part(width=64, rate=1e-4)
    assert machine.row == (Part(width=8),)
    assert machine.sizes == (3,)
    assert machine.name == "nano"


def test_configurations_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Machine().name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "key", "near"),
    [
        ({"prat": {}}, "prat", "part"),
        ({"part": {"widht": 8}}, "part.widht", "width"),
        ({"spare": {"widht": 8}}, "spare.widht", "width"),
        ({"row": [{}, {"widht": 8}]}, "row.1.widht", "width"),
        ({"named": {"left": {"widht": 8}}}, "named.left.widht", "width"),
    ],
)
def test_an_unknown_key_is_named_with_a_near_one(values: dict[str, Any], key: str, near: str) -> None:
    text = message(values)
    assert f"unknown key {key!r}" in text
    assert f"did you mean {near!r}?" in text


def test_a_key_near_to_none_is_answered_with_all_of_its_place() -> None:
    text = message({"part": {"zzz": 8}})
    assert "one of 'heads', 'kind', 'rate', 'width'" in text


def test_every_issue_is_told_at_once() -> None:
    text = message({"prat": 1, "part": {"width": "broad"}})
    assert "'prat'" in text
    assert "'part.width'" in text
    assert "found 'broad'" in text


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"part": {"width": 0}}, ["'part.width'", "greater than or equal to 1", "found 0"]),
        ({"part": {"kind": "oval"}}, ["'part.kind'", "'round' or 'square'", "found 'oval'"]),
        ({"part": 3}, ["'part'", "found 3"]),
        ({"part": None}, ["'part'", "found None"]),
        ({"sizes": 3}, ["'sizes'", "found 3"]),
        ({"part": {3: 4}}, ["'part.3'", "keys should be strings"]),
    ],
)
def test_a_wrong_value_is_named_with_what_was_found(values: dict[str, Any], parts: list[str]) -> None:
    text = message(values)
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"mixed": "some"}, "'mixed': expected 'all' or 'none', or keys and values, found 'some'"),
        ({"mixed": 3}, "'mixed': expected 'all' or 'none', or keys and values, found 3"),
        ({"mixed": {"a": -1}}, "'mixed.a': input should be greater than or equal to 0, found -1"),
        ({"mixed": {"a": "b"}}, "'mixed.a': input should be a valid number"),
        ({"either": {"a": 3}}, "'either.a': expected a list, as [this, that], or a text, found 3"),
        ({"either": {"a": ["b", 3]}}, "'either.a.1': expected a text, found 3"),
        ({"either": 3}, "'either': expected keys and values, found 3"),
        ({"listed": [1, "b"]}, "'listed.1': expected keys and values, or a valid integer"),
        ({"listed": [1, {"width": 0}]}, "'listed.1.width': input should be greater than or equal to 1, found 0"),
        ({"listed": [1, {"widht": 8}]}, "unknown key 'listed.1.widht'\n  try: did you mean 'width'?"),
        ({"listed": [{"width": 30}]}, "'listed.0': width 30 is not divisible by 4 heads"),
    ],
)
def test_a_value_of_several_kinds_has_the_key_that_was_written(values: dict[str, Any], told: str) -> None:
    text = message(values)
    assert text.startswith(f"Machine: {told}"), text
    assert ";" not in text, "one fault, one line"


def test_a_mixture_that_is_none_says_what_one_is() -> None:
    for value in ("foo", "3"):
        with pytest.raises(ConfigError) as refused:
            load_recipe("nano", overrides=[f"loader.mixture={value}"])
        text = str(refused.value)
        assert "'loader.mixture': expected 'proportional', 'sqrt' or 'equal', or keys and values, found" in text
        assert "try: proportional, sqrt, equal, or a weight for each dataset, as {photos: 2, cells: 1}" in text
    with pytest.raises(ConfigError, match=r"'loader\.mixture\.a': .* found -1"):
        load_recipe("nano", overrides=["loader.mixture={a: -1}"])


def test_contradicting_keys_are_explained_without_the_whole_tree() -> None:
    text = message({"part": {"width": 30}})
    assert text == "Machine: 'part': width 30 is not divisible by 4 heads"
    assert message({"sizes": []}) == "Machine: a machine needs a size"


def test_a_long_value_is_shortened() -> None:
    assert len(message({"part": {"width": list(range(1000))}})) < 300


def test_the_message_says_where() -> None:
    assert message({"prat": 1}).startswith("Machine: ")
    assert message({"prat": 1}, where="a.yaml").startswith("a.yaml: ")


def test_merge_goes_mapping_by_mapping() -> None:
    base = {"a": {"b": 1, "c": [1, 2]}, "d": 4}
    merged = merge(base, {"a": {"c": [3]}}, {"a": {"e": {"f": 5}}, "d": {"g": 6}}, {"a": {"e": {"h": 7}}})
    assert merged == {"a": {"b": 1, "c": [3], "e": {"f": 5, "h": 7}}, "d": {"g": 6}}
    assert base == {"a": {"b": 1, "c": [1, 2]}, "d": 4}
    assert merge({"a": {"b": 1}}, {"a": None}) == {"a": None}
    assert merge({"a": 1}) == {"a": 1}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("3", 3),
        ("-2.5", -2.5),
        ("2E5", 2e5),
        ("true", True),
        ("null", None),
        ("[1, 2]", [1, 2]),
        ("{a: 1}", {"a": 1}),
        ("budget", "budget"),
        ('"123"', "123"),
        ("'1e-4'", "1e-4"),
        ("inf", "inf"),
        ("nan", "nan"),
        ("a: b: c", "a: b: c"),
        ("[1, 2", "[1, 2"),
        ("2001-99-99", "2001-99-99"),
        ("0b_", "0b_"),
        ("a=b", "a=b"),
        ("", None),
    ],
)
def test_values_of_overrides(text: str, value: object) -> None:
    parsed = parse_overrides([f"key={text}"])["key"]
    assert parsed == value
    assert type(parsed) is type(value)


def test_overrides_nest_and_the_last_one_wins() -> None:
    tree = parse_overrides(["part.width=8", " part.heads = 2", "name=x", "part.width=16"])
    assert tree == {"part": {"width": 16, "heads": 2}, "name": "x"}
    assert Machine.checked(tree).part.width == 16


@pytest.mark.parametrize("assignment", ["width", "=3", " =3", ""])
def test_an_override_without_key_or_value_says_how_to_write_it(assignment: str) -> None:
    with pytest.raises(ConfigError, match=r"section\.key=value") as error:
        parse_overrides([assignment])
    assert repr(assignment) in str(error.value)


def test_a_number_of_a_file_may_be_written_as_a_power(tmp_path: Path) -> None:
    """YAML 1.1 takes 1e-4 for a word; the field knows better."""
    file = tmp_path / "a.yaml"
    file.write_text("part:\n  rate: 1e-4\n")
    assert Machine.checked(read_yaml(file)).part.rate == 1e-4


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    machine = Machine(name="größe", part=Part(width=64, rate=3e-5), spare=Part(), named={"left": Part(heads=2)})
    file = tmp_path / "a.yaml"
    file.write_text(as_yaml(machine), encoding="utf-8")
    assert Machine.checked(read_yaml(file)) == machine
    assert "größe" in file.read_text(encoding="utf-8")


def test_yaml_keeps_the_order_of_the_fields() -> None:
    assert list(yaml.safe_load(as_yaml(Machine()))) == list(Machine.model_fields)


def test_an_empty_file_holds_nothing(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("# nothing yet\n")
    assert read_yaml(file) == {}


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"a: [1, 2", "not readable as YAML"),
        (b"a: b: c", "not readable as YAML"),
        (b"\xff\xfe\x00\x01\x02", "not readable as YAML"),
        (b"\x80\x81\x82", "not readable as YAML"),
        (b"a: !!python/object:os.system x", "not readable as YAML"),
        (b"day: 2001-99-99", "not readable as YAML"),
        (b"- 1\n- 2\n", "found a list"),
        (b"[]", "found a list"),
        (b"false", "found a bool"),
        (b"just words", "found a str"),
        (b"1: 2", "keys that are words, found 1"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: bytes, what: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=what) as error:
        read_yaml(file)
    assert error.value.where == file


def test_a_missing_file_or_a_folder_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match="no such configuration file") as error:
            read_yaml(path)
        assert str(path) in str(error.value)


def test_leaves_and_differences_have_dotted_keys() -> None:
    assert leaves({"a": {"b": 1, "c": {"d": [2]}}, "e": {}}) == {"a.b": 1, "a.c.d": [2], "e": {}}
    first, second = Machine(), Machine(part=Part(width=64), spare=Part(), sizes=(3,))
    found = {key: (old, new) for key, old, new in differences(first, second)}
    assert found["part.width"] == (32, 64)
    assert found["sizes"] == ([1, 2], [3])
    assert found["spare"] == (None, Part().model_dump())
    assert differences(first, first) == []


def test_every_field_has_its_docstring_as_a_description() -> None:
    class Documented(Config):
        """One."""

        size: int = 3
        """Pixels."""

    assert Documented.model_fields["size"].description == "Pixels."


WORDS = [(word, key) for key, words in OTHERS_WORDS.items() for word in words.split()]


def test_every_key_that_a_word_of_others_leads_to_is_one() -> None:
    known = {*leaves(RunConfig().model_dump(mode="json"))}
    assert set(OTHERS_WORDS) <= known
    assert len({word for word, _ in WORDS}) == len(WORDS), "no word stands for two keys"


@pytest.mark.parametrize("place", ["", "train.", "model."])
@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("image_size", "augmentation.resize.size"),
        ("imgsz", "augmentation.resize.size"),
        ("size", "augmentation.resize.size"),
        ("lr", "train.optimizer.learning_rate"),
        ("LR", "train.optimizer.learning_rate"),
        ("batch", "loader.batch_size"),
        ("per-device-train-batch-size", "loader.batch_size"),
        ("max_iter", "train.loop.steps"),
        ("num_queries", "model.queries.number"),
    ],
)
def test_words_of_other_libraries_lead_to_the_key(place: str, word: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("nano", overrides=[f"{place}{word}=320"])
    assert f"unknown key '{place}{word}'" in str(caught.value)
    assert f"'{key}'" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("batch_size=4", "'loader.batch_size' or 'inference.batch_size'"),
        ("learning_rate=1e-4", "'train.optimizer.learning_rate'"),
        ("train.steps=9", "'train.loop.steps'"),
        ("seed=1", "'train.loop.seed'"),
        ("epochs=5", "--epochs N"),
        ("size=small", "--size is an option"),
        ("weights=last.pt", "metr finetune DATA --from"),
        ("train.optimizer.learning_rat=1", "did you mean 'learning_rate'?"),
    ],
)
def test_parts_of_keys_and_options_are_told(given: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("nano", overrides=[given])
    assert told in str(caught.value.hint)


def test_words_lead_only_to_keys_that_a_configuration_has() -> None:
    with pytest.raises(ConfigError) as caught:
        OptimizerConfig.checked({"imgsz": 320})
    assert "augmentation" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"'conf' is called 'postprocess.score_threshold' here"):
        inference_config(["inference.conf=0.5"])
