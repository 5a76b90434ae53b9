"""YAML that is made to fill the memory or to keep the processor busy is refused at once, wherever it is read."""

import ast
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import metr
from metr.bounded_yaml import load_yaml, load_yaml_file, parse_yaml
from metr.config import parse_overrides, read_yaml
from metr.data.datasets_file import parse_data_arguments
from metr.data.formats.registry import recognise
from metr.errors import MetrError
from metr.inference.request import names_to_find


def laughs(depth: int = 12, wide: int = 10) -> str:
    """A few hundred bytes that stand for 10^12 values."""
    lines = ["a0: &a0 lol"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * wide)}]" for n in range(1, depth)]
    return "\n".join(lines) + "\n"


def merged(depth: int = 30) -> str:
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, depth)]
    return "\n".join(lines) + "\n"


ATTACKS = {
    "laughs": laughs(),
    "merges": merged(),
    "itself": "names: &a [*a]\n",
    "itself as a key": "names: &a {x: *a}\n",
    "brackets": "names: " + "[" * 50_000,
    "deep": "names: " + "[" * 3_000 + "]" * 3_000,
    "dashes": "- " * 20_000 + "x",
    "sexagesimal": "names: " + ":".join(["1"] * 300_000),
    "a long number": "names: !!int " + "9" * 100_000,
    "hexadecimal": "names: !!int 0x" + "f" * 1_000_000,
    "a million aliases": "a: &a [x, y, z]\nnames: [" + "*a, " * 100_000 + "]\n",
    "too long": "names: [" + "x, " * 2_000_000 + "]",
}


@pytest.mark.parametrize("text", ATTACKS.values(), ids=ATTACKS)
def test_attacks_are_refused_at_once(text: str, tmp_path: Path) -> None:
    file = tmp_path / "data.yaml"
    file.write_text(text)
    began = time.monotonic()
    for call, given_text in ((load_yaml, text), (load_yaml_file, file)):
        said = ""
        try:
            found = call(given_text)
        except yaml.YAMLError as error:
            said, found = str(error), None
        assert len(said) < 1_000
        assert len(repr(found)) < 2 * len(text)  # long numbers without a tag are text
    assert time.monotonic() - began < 20


ENTRIES: list[Callable[[Path], object]] = [
    read_yaml,
    lambda file: parse_data_arguments([str(file)]),
    lambda file: recognise(file.parent),
    lambda file: names_to_find(None, file),
]


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("key", ["names", "path", "train", "datasets"])
def test_every_reader_refuses_them(entry: Callable[[Path], object], key: str, tmp_path: Path) -> None:
    file = tmp_path / "data.yaml"
    file.write_text(f"{laughs(9)}names: [cat]\ntrain: images\n{key}: *a8\n")
    (tmp_path / "images").mkdir()
    began = time.monotonic()
    with pytest.raises(MetrError) as refused:
        entry(file)
    assert time.monotonic() - began < 5
    assert len(str(refused.value)) < 2_000


def test_settings_of_a_command_are_bounded() -> None:
    began = time.monotonic()
    assert len(repr(parse_overrides(["a=[" + "[" * 5_000]))) < 20_000
    assert time.monotonic() - began < 5


def test_anchors_that_people_write_are_read() -> None:
    text = "base: &base {rate: 1, sizes: [1, 2]}\nfirst: {<<: *base, rate: 2}\nsecond: *base\n"
    found = load_yaml(text)
    assert found == yaml.safe_load(text)
    assert found["first"] == {"rate": 2, "sizes": [1, 2]}


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=30,
)


@given(_VALUES)
def test_plain_values_are_read_as_pyyaml_reads_them(value: object) -> None:
    text = yaml.safe_dump(value, allow_unicode=True)
    assert load_yaml(text) == yaml.safe_load(text)


@given(st.text(alphabet="[]{}:,&*!|>-#'\"% \n\tab0.~?", max_size=60))
def test_nothing_but_yaml_errors(text: str) -> None:
    try:
        expected: object = yaml.safe_load(text)
    except Exception:
        expected = yaml.YAMLError
    try:
        found = load_yaml(text)
    except yaml.YAMLError:
        return
    assert repr(found) == repr(expected)


def test_lines_are_told() -> None:
    node = parse_yaml("a: 1\nb:\n  - x\n")
    assert isinstance(node, yaml.MappingNode)
    assert [key.start_mark.line for key, _ in node.value] == [0, 1]
    assert parse_yaml("") is None


def test_yaml_is_read_in_one_place() -> None:
    source = Path(metr.__file__).parent
    readers = {"load", "safe_load", "compose", "parse", "full_load", "unsafe_load", "load_all", "safe_load_all", "scan"}
    found = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in readers
        if isinstance(node.value, ast.Name) and node.value.id == "yaml"
    }
    assert found == set()
