"""Boxes in JSON files: COCO, labelme, Label Studio."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from metr.data.appending.base import Appending, CannotAppendError, Edits, by_file, names_of, read_text, write_text
from metr.data.formats.base import plain_name
from metr.data.formats.label_studio import label_studio_region
from metr.data.formats.labelme import labelme_shape
from metr.data.formats.written import WrittenBox, rounded


def append_to_coco(work: Appending) -> None:
    """Adds annotations, and the categories that are new."""
    for file, listed in by_file(work.additions, ", image ").items():
        text, encoding = read_text(work.root / file)
        content = _json(text)
        spans = {key: (start, end) for key, start, end in _members(text, _first(text))}
        ids = {str(item.get("id")): item.get("id") for item in content["images"]}
        categories = {plain_name(str(item["name"])): item["id"] for item in content["categories"]}
        numbers = [value for value in categories.values() if isinstance(value, int)]
        if len(numbers) < len(categories) or not {"annotations", "categories"} <= spans.keys():
            raise CannotAppendError(f"{file} has categories without numbers, or no list of annotations")
        fresh = [name for name in names_of([one for _, one in listed]) if name not in categories]
        categories |= {name: number for number, name in enumerate(fresh, start=max(numbers, default=0) + 1)}
        known = [item.get("id") for item in content["annotations"]]
        first = max((number for number in known if isinstance(number, int)), default=0) + 1
        pairs = [(ids[number], box) for number, one in listed for box in one.boxes]
        rows = [_coco_row(first + n, image, categories[box.name], box) for n, (image, box) in enumerate(pairs)]
        edits = [_into_list(text, spans["annotations"], rows)]
        edits += [_into_list(text, spans["categories"], [{"id": categories[name], "name": name} for name in fresh])]
        write_text(work.root / file, text, encoding, edits)


def _coco_row(number: int, image: Any, category: int, box: WrittenBox) -> dict[str, Any]:
    left, top, right, bottom = map(rounded, box.box)
    sides = [rounded(right - left), rounded(bottom - top)]
    row: dict[str, Any] = {"id": number, "image_id": image, "category_id": category, "bbox": [left, top, *sides]}
    row |= {"area": rounded(sides[0] * sides[1]), "segmentation": [], "iscrowd": 0, "source": "metr"}
    return row if box.score is None else row | {"score": round(box.score, 5)}


def _json(text: str) -> Any:
    try:
        return json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise CannotAppendError(f"not readable as JSON: {error}") from None


_DECODER = json.JSONDecoder()
_BLANK = re.compile(r"[\s\ufeff]*")
_BETWEEN = re.compile(r"\s*[:,]?\s*")


def _first(text: str) -> int:
    """Where the value of a JSON file begins."""
    match = _BLANK.match(text)
    return match.end() if match else 0


def _members(text: str, start: int) -> Iterator[tuple[Any, int, int]]:
    """The key or number, the start and the end of each value of the JSON object or list that begins at `start`."""
    is_object, place, number = text[start] == "{", start + 1, 0
    while True:
        place = _after(text, place)
        if text[place] in "]}":
            return
        key: Any = number
        if is_object:
            key, place = _DECODER.raw_decode(text, place)
            place = _after(text, place)
        end = _DECODER.raw_decode(text, place)[1]
        yield key, place, end
        place, number = end, number + 1


def _after(text: str, place: int) -> int:
    match = _BETWEEN.match(text, place)
    return match.end() if match else place


def _into_list(text: str, span: tuple[int, int], items: Sequence[Any]) -> tuple[int, str]:
    """An edit that adds items to the JSON list of a span, in front of its bracket and what stands before that."""
    inner = text[span[0] + 1 : span[1] - 1]
    place = span[0] + 1 + len(inner.rstrip())
    told = ", ".join(json.dumps(item, ensure_ascii=False) for item in items)
    return place, (", " if inner.strip() and items else "") + told


def append_to_labelme(work: Appending) -> None:
    """Adds rectangles."""
    for one in work.additions:
        text, encoding = read_text(work.root / one.where)
        _json(text)
        shapes = next(((start, end) for key, start, end in _members(text, _first(text)) if key == "shapes"), None)
        if shapes is None:
            raise CannotAppendError(f"{one.where} has no shapes")
        write_text(
            work.root / one.where, text, encoding, [_into_list(text, shapes, list(map(labelme_shape, one.boxes)))]
        )


def append_to_label_studio(work: Appending) -> None:
    """Adds regions to the annotation that readers take."""
    for file, listed in by_file(work.additions, ", entry ").items():
        text, encoding = read_text(work.root / file)
        tasks, wanted = _json(text), {int(number): one for number, one in listed}
        names = _controls(tasks)
        edits: Edits = []
        for place, start, _ in _members(text, _first(text)):
            one = wanted.get(place + 1)
            if one is not None:
                ids = (f"metr-{place + 1}-{number}" for number in range(1, len(one.boxes) + 1))
                regions = [
                    label_studio_region(box, one.size, name, names) for box, name in zip(one.boxes, ids, strict=True)
                ]
                edits.append(_into_list(text, _result_span(text, start, tasks[place]), regions))
        write_text(work.root / file, text, encoding, edits)


def _controls(tasks: Sequence[Any]) -> tuple[str, str]:
    """What the control of rectangles and the image are called in a project, by its first region."""
    regions = (
        region
        for task in tasks
        for annotation in task.get("annotations") or ()
        for region in annotation.get("result") or ()
        if region.get("type") == "rectanglelabels" and "from_name" in region and "to_name" in region
    )
    first = next(regions, {"from_name": "label", "to_name": "image"})
    return str(first["from_name"]), str(first["to_name"])


def _result_span(text: str, start: int, task: Mapping[str, Any]) -> tuple[int, int]:
    """Where the result of the annotation stands that readers take: the ground truth, else the first submitted one."""
    annotations = task.get("annotations") or []
    submitted = [n for n, one in enumerate(annotations) if not one.get("was_cancelled")]
    chosen = next((n for n in submitted if annotations[n].get("ground_truth")), next(iter(submitted), None))
    lists = (s for key, s, _ in _members(text, start) if key == "annotations")
    one = next((s for begin in lists for n, s, _ in _members(text, begin) if n == chosen), None)
    spans = () if one is None else ((s, end) for key, s, end in _members(text, one) if key == "result")
    found = next(iter(spans), None)
    if found is None:
        raise CannotAppendError("an entry without the result of an annotation, as in JSON-MIN")
    return found
