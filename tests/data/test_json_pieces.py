"""Large JSON in pieces: the values of any file are found, and arrays are cut between elements."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metr.data.formats import json_pieces
from metr.data.formats.json_pieces import values_of

NASTY = ['"}, {"', "}],", '\\"', "\\", "ё€ \U0001f600", "[{", "", "a" * 70]


def made_value(rng: np.random.Generator, depth: int = 0) -> Any:
    kind = int(rng.integers(4 if depth > 3 else 8))
    if kind < 4:
        plain = (None, True, float(rng.normal()), int(rng.integers(-(10**12), 10**12)), str(rng.choice(NASTY)))
        return plain[int(rng.integers(len(plain)))]
    count = int(rng.integers(4))
    if kind < 6:
        return [made_value(rng, depth + 1) for _ in range(count)]
    return {f"{rng.choice(NASTY)}{number}": made_value(rng, depth + 1) for number in range(count)}


def made_content(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    lists = [[{"id": number, "x": made_value(rng)} for number in range(int(rng.integers(40)))] for _ in range(2)]
    return {"images": lists[0], "info": made_value(rng), '"': made_value(rng), "annotations": lists[1], "s": "}]"}


def written(path: Path, content: Any, **options: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content, **options), encoding="utf-8")
    return path


def read(path: Path, size: int) -> dict[str, Any]:
    """What the pieces hold; each must be an array of whole elements, by the standard library's judgement."""
    found = {}
    for key, value in values_of(path, size).items():
        if value.is_array:
            found[key] = [item for piece in value.pieces() for item in json.loads(piece)]
            assert json.loads(value.text()) == found[key]
        else:
            assert list(value.pieces()) == []
            found[key] = json.loads(value.text())
    return found


@pytest.mark.parametrize("seed", range(8))
def test_pieces_hold_what_the_file_holds(tmp_path: Path, seed: int) -> None:
    content = made_content(seed)
    styles = ({}, {"indent": 1}, {"separators": (",", ":"), "ensure_ascii": False})
    path = written(tmp_path / "a.json", content, **styles[seed % 3])
    for size in (1, 40, 333, 1 << 20):
        assert read(path, size) == content


def test_arrays_are_cut(tmp_path: Path) -> None:
    content = {"annotations": [{"id": number, "parts": [{"a": [[1, 2], {}]}, {}]} for number in range(1000)]}
    path = written(tmp_path / "a.json", content)
    value = values_of(path, 2000)["annotations"]
    pieces = list(value.pieces())
    assert max(map(len, pieces)) <= 2002
    assert len(pieces) < 2 * path.stat().st_size / 2000
    assert [item for piece in pieces for item in json.loads(piece)] == content["annotations"]


def test_numbers_of_python_and_arrays_of_numbers(tmp_path: Path) -> None:
    """Values that are not valid JSON are found if their brackets match."""
    boxes = ", ".join(f'{{"bbox": [NaN, -Infinity, {number}, 1]}}' for number in range(100))
    path = written(tmp_path / "a.json", f'{{"n": NaN, "boxes": [{boxes}], "scalars": [1, 2, "]", NaN], "none": [ ]}}')
    for size in (1, 50, 1 << 20):
        found = values_of(path, size)
        assert found["n"].text() == b"NaN"
        assert json.loads(found["boxes"].text())[99]["bbox"][2:] == [99, 1]
        assert json.loads(found["scalars"].text())[:3] == [1, 2, "]"]
        assert found["none"].spans == ()
        assert found["none"].text() == b"[]"
    assert len(values_of(path, 50)["boxes"].spans) > 10


def test_files_that_end_early_are_refused(tmp_path: Path) -> None:
    text = json.dumps(made_content(1))
    for end in range(0, len(text), 1 + len(text) // 100):
        path = written(tmp_path / "a.json", text[:end])
        for size in (16, 1 << 20):
            with pytest.raises(ValueError):
                values_of(path, size)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", '{"a": 1} {', '{"a" 1}', '{"a": }', '{"a": [1}', '{"\xff', "{a: 1}"]
)
def test_what_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError):
        values_of(written(tmp_path / "a.json", text), 1 << 10)


def test_little_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    plain_read = json_pieces._read

    def counted(file: Any, place: int, size: int) -> bytes:
        sizes.append(len(plain_read(file, place, size)))
        return plain_read(file, place, size)

    monkeypatch.setattr(json_pieces, "_read", counted)
    monkeypatch.setattr(json_pieces, "_KEY_BYTES", 1000)
    content = {"images": [{"id": number} for number in range(5000)], "info": {"x": ["y" * 50] * 2000}}
    path = written(tmp_path / "a.json", content)
    assert read(path, 1000) == content
    assert path.stat().st_size > 150_000
    # Only this test asks for the text of a whole value; readers do not.
    whole = max(stop - start for start, stop in values_of(path, 1000)["info"].spans)
    assert max(size for size in sizes if size != whole) <= 1000
