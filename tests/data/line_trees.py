"""The made-up dataset of `reader_trees` in the formats with a JSON line or a JSON file an image."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from reader_trees import NAMES, ExpectedImage, Truth, save_image, write_json, write_text


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    """JSON lines."""
    return write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def xywh(box: tuple[int, int, int, int]) -> list[int]:
    left, top, right, bottom = box
    return [left, top, right - left, bottom - top]


def odgt_line(image: ExpectedImage) -> dict[str, Any]:
    """A line of CrowdHuman, whose names are tags."""
    boxes = [
        {"tag": label, "fbox": xywh(box), "vbox": [0, 0, 1, 1], "hbox": [0, 0, 2, 2], "extra": {"box_id": 0, "occ": 1}}
        | {"head_attr": {"ignore": 0, "occ": 0}}
        for box, label in zip(image.boxes, image.labels, strict=True)
    ]
    return {"ID": Path(image.name).stem, "gtboxes": boxes}


def crowdhuman_plain(root: Path, truth: Truth) -> None:
    for split, images in truth.items():
        write_lines(root / f"annotation_{split}.odgt", [odgt_line(item) for item in images])
        _save(root / "Images", images)


def crowdhuman_folders(root: Path, truth: Truth) -> None:
    """One folder of images a split, as they are unpacked for ByteTrack."""
    for split, images in truth.items():
        write_lines(root / "annotations" / f"annotation_{split}.odgt", [odgt_line(item) for item in images])
        _save(root / f"CrowdHuman_{split}01" / "ImageFolder", images)


def shapes(image: ExpectedImage) -> list[dict[str, Any]]:
    """The objects of an image as shapes of every kind that has an extent and corners in whole pixels."""
    found = []
    for number, ((left, top, right, bottom), label) in enumerate(zip(image.boxes, image.labels, strict=True)):
        middle, centre = (left + right) / 2, (top + bottom) / 2
        kind, points = [
            ("rectangle", [[right, bottom], [left, top]]),
            ("rectangle", [[left, top], [right, top], [right, bottom], [left, bottom]]),
            ("polygon", [[middle, top], [right, centre], [middle, bottom], [left, centre]]),
            (None, [[left, top], [right, top], [right, bottom]]),
            ("mask", [[left, top], [right, bottom]]),
        ][number % 5]
        shape = {"label": label, "points": points, "group_id": None, "flags": {}, "mask": "AAAA"}
        found.append(shape | ({} if kind is None else {"shape_type": kind}))
    return found


def labelme_content(image: ExpectedImage, path: str | None = None, size: bool = True) -> dict[str, Any]:
    """The JSON of an image, which holds the image as text."""
    content = {"version": "5.5.0", "flags": {}, "shapes": shapes(image), "imagePath": path or image.name}
    height, width = (image.height, image.width) if size else (None, None)
    return content | {"imageData": "abcd" * 20_000, "imageHeight": height, "imageWidth": width}


def labelme_beside(root: Path, truth: Truth) -> None:
    for split, images in truth.items():
        for item in images:
            write_json(root / split / f"{Path(item.name).stem}.json", labelme_content(item))
        _save(root / split, images)


def labelme_apart(root: Path, truth: Truth) -> None:
    """JSON files in folders of their own, written on Windows, numbered otherwise than the images, without sizes."""
    for split, images in truth.items():
        for number, item in enumerate(images):
            content = labelme_content(item, f"..\\images\\{item.name}", size=False)
            write_json(root / "sets" / split / "json" / f"{number}.json", content)
        _save(root / "sets" / split / "images", images)
        write_json(root / "sets" / split / "json" / "summary.JSON.bak", {})


def odvg_line(image: ExpectedImage, categories: bool = True, labels: bool = True) -> dict[str, Any]:
    """A line of detections."""
    instances = [
        {"bbox": list(box)}
        | ({"category": label} if categories else {})
        | ({"label": NAMES.index(label)} if labels else {})
        for box, label in zip(image.boxes, image.labels, strict=True)
    ]
    size = {"height": image.height, "width": image.width}
    return {"filename": image.name, **size, "detection": {"instances": instances}}


def odvg_plain(root: Path, truth: Truth) -> None:
    """As MM-Grounding-DINO converts COCO, beside its label map and one of another dataset."""
    for split, images in truth.items():
        write_lines(root / f"cells_{split}_od.json", [odvg_line(item, categories=False) for item in images])
        _save(root / split, images)
    write_json(root / "cells_label_map.json", {str(label): name for label, name in enumerate(NAMES)})
    write_json(root / "other_label_map.json", {"0": "wrong", "1": "names"})


def odvg_names(root: Path, truth: Truth) -> None:
    """Names without labels, and a folder of images that no other format knows."""
    for split, images in truth.items():
        write_lines(root / "annotations" / f"{split}.jsonl", [odvg_line(item, labels=False) for item in images])
        _save(root / "cell_images", images)


def imagefolder_row(image: ExpectedImage, folder: str = "", key: str = "categories") -> dict[str, Any]:
    """A row with lists side by side and numbered categories."""
    objects = {"bbox": [xywh(box) for box in image.boxes], key: [NAMES.index(label) for label in image.labels]}
    return {"file_name": folder + image.name, "objects": objects}


def imagefolder_lines(root: Path, truth: Truth) -> None:
    for split, images in truth.items():
        write_lines(root / split / "metadata.jsonl", [imagefolder_row(item) for item in images])
        _save(root / split, images)
    write_text(root / "classes.txt", "\n".join(NAMES) + "\n")


def imagefolder_card(root: Path, truth: Truth) -> None:
    """One file for all splits, and a card that names the categories (and those of another feature)."""
    rows = [imagefolder_row(item, f"{split}/", "category") for split, items in truth.items() for item in items]
    write_lines(root / "data" / "metadata.jsonl", rows)
    for split, images in truth.items():
        _save(root / "data" / split, images)
    names = "".join(f"              '{number}': {name}\n" for number, name in enumerate(NAMES))
    card = (
        "---\nlicense: mit\ndataset_info:\n  features:\n  - name: scene\n    dtype:\n      class_label:\n"
        "        names:\n          '0': indoors\n  - name: objects\n    sequence:\n    - name: bbox\n"
        "      sequence: float32\n      length: 4\n    - name: category\n      dtype:\n          class_label:\n"
        f"            names:\n{names}---\n\n# Cells\n"
    )
    write_text(root / "README.md", card)


def imagefolder_csv(root: Path, truth: Truth) -> None:
    """Objects as Python prints them, names as categories, another name of the image's column."""
    for split, images in truth.items():
        folder = root / {"val": "validation"}.get(split, split)
        _save(folder, images)
        with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["image_file_name", "objects", "width", "height"])
            for item in images:
                objects = {"bbox": [xywh(box) for box in item.boxes], "label": list(item.labels)}
                rows.writerow([item.name, str(objects), item.width, item.height])


def imagefolder_parquet(root: Path, truth: Truth) -> None:
    """A list of objects in each row."""
    kind = pa.list_(pa.struct([("bbox", pa.list_(pa.float64())), ("category", pa.string())]))
    schema = pa.schema([("file_name", pa.string()), ("objects", kind)])
    for split, images in truth.items():
        _save(root / split, images)
        rows = [
            {
                "file_name": item.name,
                "objects": [
                    {"bbox": xywh(box), "category": label} for box, label in zip(item.boxes, item.labels, strict=True)
                ],
            }
            for item in images
        ]
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), root / split / "metadata.parquet")


LINE_LAYOUTS: dict[str, tuple[str, Callable[[Path, Truth], None]]] = {
    "crowdhuman plain": ("crowdhuman", crowdhuman_plain),
    "crowdhuman folders": ("crowdhuman", crowdhuman_folders),
    "labelme beside": ("labelme", labelme_beside),
    "labelme apart": ("labelme", labelme_apart),
    "odvg plain": ("odvg", odvg_plain),
    "odvg names": ("odvg", odvg_names),
    "imagefolder lines": ("imagefolder", imagefolder_lines),
    "imagefolder card": ("imagefolder", imagefolder_card),
    "imagefolder csv": ("imagefolder", imagefolder_csv),
    "imagefolder parquet": ("imagefolder", imagefolder_parquet),
}


def _save(folder: Path, images: Sequence[ExpectedImage]) -> None:
    for image in images:
        save_image(folder / image.name, image.width, image.height)
