"""The made-up dataset in the formats of annotation tools and of published benchmarks."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from reader_trees import NAMES, ExpectedImage, Truth, save_image, write_json, write_text

Box = tuple[int, int, int, int]


def save(folder: Path, images: Sequence[ExpectedImage]) -> None:
    for image in images:
        save_image(folder / image.name, image.width, image.height)


def pairs(image: ExpectedImage) -> list[tuple[Box, str]]:
    return list(zip(image.boxes, image.labels, strict=True))


def via_regions(image: ExpectedImage) -> list[dict[str, Any]]:
    """Rectangles, and diamonds as polygons; two attributes, one of which is called like categories are."""
    regions = []
    for number, ((left, top, right, bottom), label) in enumerate(pairs(image)):
        x, y = (
            [(left + right) / 2, right, (left + right) / 2, left],
            [top, (top + bottom) / 2, bottom, (top + bottom) / 2],
        )
        rect = {"name": "rect", "x": left, "y": top, "width": right - left, "height": bottom - top}
        shape = {"name": "polygon", "all_points_x": x, "all_points_y": y} if number % 2 else rect
        regions.append({"shape_attributes": shape, "region_attributes": {"kind_of_cell": label}})
    return regions


def via_content(images: Sequence[ExpectedImage]) -> dict[str, Any]:
    return {
        f"{image.name}4000": {
            "filename": image.name,
            "size": 4000,
            "regions": via_regions(image),
            "file_attributes": {},
        }
        for image in images
    }


def via_json(root: Path, truth: Truth) -> None:
    """A file in the folder of each split, regions numbered as by version 1."""
    for split, images in truth.items():
        content = via_content(images)
        for image in content.values():
            image["regions"] = {str(number): region for number, region in enumerate(image["regions"])}
        write_json(root / split / "via_region_data.json", content)
        save(root / split, images)


def via_project(root: Path, truth: Truth) -> None:
    settings = {"ui": {}, "core": {"filepath": {}, "default_filepath": ""}, "project": {"name": "cells"}}
    for split, images in truth.items():
        content = {"_via_settings": settings, "_via_img_metadata": via_content(images), "_via_attributes": {}}
        write_json(root / f"via_project_{split}.json", content | {"_via_data_format_version": "2.0.10"})
        save(root / "images", images)


def via_csv(root: Path, truth: Truth) -> None:
    header = "filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,region_attributes"
    for split, images in truth.items():
        rows: list[list[object]] = [[*f"#{header}".split(",")]]
        for image in images:
            regions = via_regions(image)
            for number, region in enumerate(regions):
                shape, attributes = (json.dumps(region[f"{key}_attributes"]) for key in ("shape", "region"))
                rows.append([image.name, 4000, "{}", len(regions), number, shape, attributes])
            if not regions:
                rows.append([image.name, 4000, '"{}"', 0, 0, "{}", "{}"])
        path = root / split / "via_export_csv.csv"
        path.parent.mkdir(parents=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
        save(root / split, images)


def dota_lines(image: ExpectedImage) -> str:
    """The corners of a diamond that touches all sides of the box. Names may have spaces (Roboflow)."""
    lines = []
    for (left, top, right, bottom), label in pairs(image):
        x, y = (left + right) / 2, (top + bottom) / 2
        lines.append(f"{x} {top} {right} {y} {x} {bottom} {left} {y} {label} 0\n")
    return "".join(lines)


def dota_roboflow(root: Path, truth: Truth) -> None:
    for split, images in truth.items():
        folder = root / {"val": "valid"}.get(split, split)
        save(folder / "images", images)
        for image in images:
            write_text(folder / "labelTxt" / f"{Path(image.name).stem}.txt", dota_lines(image))


def dota_plain(root: Path, truth: Truth) -> None:
    for split, images in truth.items():
        save(root / split / "images", images)
        for image in images:
            text = "imagesource:GoogleEarth\ngsd:0.146343590398\n" + dota_lines(image)
            write_text(root / split / "labelTxt-v1.5" / f"{Path(image.name).stem}.txt", text)


def cvat_image(image: ExpectedImage, number: int, subset: str | None) -> str:
    shapes = ""
    for place, ((left, top, right, bottom), label) in enumerate(pairs(image)):
        points = f"{left}.00,{top}.00;{right}.00,{top}.00;{right}.00,{bottom}.00"
        common = f'label="{escape(label)}" source="manual" occluded="0" z_order="0"'
        box = f'<box {common} xtl="{left}.00" ytl="{top}.00" xbr="{right}.00" ybr="{bottom}.00"></box>'
        shapes += f'<polygon {common} points="{points}"></polygon>' if place % 2 else box
    named = "" if subset is None else f' subset="{subset}"'
    size = f'width="{image.width}" height="{image.height}"'
    return f'<image id="{number}" name="{escape(image.name)}"{named} {size}>{shapes}</image>\n'


def cvat_xml(images: Sequence[tuple[ExpectedImage, str | None]], owner: str = "task") -> str:
    labels = "".join(
        f"<label><name>{name}</name><color>#ff0000</color><attributes></attributes></label>" for name in NAMES
    )
    meta = f"<meta><{owner}><id>1</id><labels>{labels}</labels></{owner}><dumped>2024-01-01</dumped></meta>"
    listed = "".join(cvat_image(image, number, subset) for number, (image, subset) in enumerate(images))
    body = f"<annotations>\n<version>1.1</version>\n{meta}\n{listed}</annotations>\n"
    return '<?xml version="1.0" encoding="utf-8"?>\n' + body


def cvat_project(root: Path, truth: Truth) -> None:
    """Subsets in one file, and in folders of the images."""
    subsets = {"train": "Train", "val": "Validation", "test": "Test"}
    listed = [(image, subsets[split]) for split, images in truth.items() for image in images]
    write_text(root / "annotations.xml", cvat_xml(listed, "project"))
    for split, images in truth.items():
        save(root / "images" / subsets[split], images)


def cvat_tasks(root: Path, truth: Truth) -> None:
    for split, images in truth.items():
        write_text(root / split / "annotations.xml", cvat_xml([(image, None) for image in images]))
        save(root / split / "images", images)


def labelme_xml_text(image: ExpectedImage) -> str:
    objects = ""
    for number, ((left, top, right, bottom), label) in enumerate(pairs(image)):
        corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
        points = "".join(f"<pt><x>{x}</x><y>{y}</y></pt>" for x, y in corners)
        objects += (
            f"<object><name>{label}</name><deleted>0</deleted><verified>0</verified><occluded>no</occluded><attributes/>"
            f"<parts><hasparts/><ispartof/></parts><id>{number}</id><polygon><username/>{points}</polygon></object>"
        )
    size = f"<imagesize><nrows>{image.height}</nrows><ncols>{image.width}</ncols></imagesize>"
    return f"<annotation><filename>{image.name}</filename><folder>cells</folder>{objects}{size}</annotation>"


def labelme_xml(root: Path, truth: Truth) -> None:
    for split, images in truth.items():
        save(root / "Images" / split, images)
        for image in images:
            write_text(root / "Annotations" / split / f"{Path(image.name).stem}.xml", labelme_xml_text(image))


def studio_region(image: ExpectedImage, box: Box, label: str, number: int) -> dict[str, Any]:
    """A rectangle or a polygon, in per cent of the image."""
    left, top, right, bottom = box
    x, y = 100 / image.width, 100 / image.height
    corners = [[left * x, top * y], [right * x, top * y], [right * x, bottom * y]]
    rectangle = {"x": left * x, "y": top * y, "width": (right - left) * x, "height": (bottom - top) * y, "rotation": 0}
    kind = "polygonlabels" if number % 2 else "rectanglelabels"
    return {
        "original_width": image.width,
        "original_height": image.height,
        "image_rotation": 0,
        "value": {**({"points": corners} if number % 2 else rectangle), kind: [label]},
        "id": f"r{number}",
        "from_name": "label",
        "to_name": "image",
        "type": kind,
    }


def studio_task(image: ExpectedImage, address: str, number: int) -> dict[str, Any]:
    result = [studio_region(image, box, label, place) for place, (box, label) in enumerate(pairs(image))]
    annotation = {"id": number, "completed_by": 1, "result": result, "was_cancelled": False, "ground_truth": False}
    return {
        "id": number,
        "annotations": [annotation],
        "drafts": [],
        "predictions": [],
        "data": {"image": address},
        "meta": {},
        "file_upload": Path(address).name,
    }


def label_studio(root: Path, truth: Truth) -> None:
    """Uploads, whose images lie there as they were called before, or as Label Studio calls them."""
    for split, images in truth.items():
        tasks = [studio_task(image, f"/data/upload/1/{n:08x}-{image.name}", n) for n, image in enumerate(images)]
        write_json(root / f"project-{split}.json", tasks)
        save(root / "images", images)


def label_studio_minimal(root: Path, truth: Truth) -> None:
    for split, images in truth.items():
        rows = []
        for number, image in enumerate(images):
            task = studio_task(image, f"/data/local-files/?d={split}/{image.name}", number)
            regions = [
                {**item["value"], "original_width": image.width, "original_height": image.height}
                for item in task["annotations"][0]["result"]
            ]
            row = {"image": task["data"]["image"], "id": number, "annotator": 1, "annotation_id": number}
            rows.append(row | ({"label": regions} if regions else {}))
        write_json(root / f"{split}-min.json", rows)
        save(root / split, images)


def createml(root: Path, truth: Truth) -> None:
    for split, images in truth.items():
        folder, content = root / {"val": "valid"}.get(split, split), []
        for image in images:
            items = [
                {
                    "label": label,
                    "coordinates": {
                        "x": (left + right) / 2,
                        "y": (top + bottom) / 2,
                        "width": right - left,
                        "height": bottom - top,
                    },
                }
                for (left, top, right, bottom), label in pairs(image)
            ]
            content.append({"image": image.name, "annotations": items})
        write_json(folder / "_annotations.createml.json", content)
        save(folder, images)


def bdd100k(root: Path, truth: Truth) -> None:
    for split, images in truth.items():
        content = []
        for image in images:
            labels = [
                {
                    "id": str(number),
                    "category": label,
                    "attributes": {"occluded": False, "truncated": False},
                    "box2d": dict(zip(("x1", "y1", "x2", "y2"), map(float, box), strict=True)),
                }
                for number, (box, label) in enumerate(pairs(image))
            ]
            content.append(
                {"name": image.name, "attributes": {"weather": "clear"}, "timestamp": 10000, "labels": labels}
            )
        write_json(root / "labels" / "det_20" / f"det_{split}.json", content)
        save(root / "images" / "100k" / split, images)


def datumaro(root: Path, truth: Truth) -> None:
    labels = [{"name": name, "parent": "", "attributes": []} for name in NAMES]
    for split, images in truth.items():
        items = []
        for image in images:
            annotations = [
                {
                    "id": number,
                    "type": "bbox",
                    "attributes": {"occluded": False},
                    "group": 0,
                    "label_id": NAMES.index(label),
                    "z_order": 0,
                    "bbox": [left, top, right - left, bottom - top],
                }
                for number, ((left, top, right, bottom), label) in enumerate(pairs(image))
            ]
            listed = {"path": image.name, "size": [image.height, image.width]}
            items.append(
                {"id": Path(image.name).stem, "annotations": annotations, "attr": {"frame": 0}, "image": listed}
            )
        categories = {"label": {"labels": labels, "attributes": ["occluded"]}, "points": {"items": []}}
        write_json(root / "annotations" / f"{split}.json", {"info": {}, "categories": categories, "items": items})
        save(root / "images" / split, images)


TOOL_LAYOUTS: dict[str, tuple[str, Callable[[Path, Truth], None]]] = {
    "via json": ("via", via_json),
    "via project": ("via", via_project),
    "via csv": ("via", via_csv),
    "dota roboflow": ("dota", dota_roboflow),
    "dota plain": ("dota", dota_plain),
    "cvat project": ("cvat", cvat_project),
    "cvat tasks": ("cvat", cvat_tasks),
    "labelme xml": ("labelme_xml", labelme_xml),
    "label studio": ("label_studio", label_studio),
    "label studio minimal": ("label_studio", label_studio_minimal),
    "createml": ("createml", createml),
    "bdd100k": ("bdd100k", bdd100k),
    "datumaro": ("datumaro", datumaro),
}


def kitti_line(name: str, box: Sequence[float], rest: str = "-1 -1 -1 -1000 -1000 -1000 -10") -> str:
    """A line of fifteen columns."""
    return f"{name} 0.00 0 -10 {' '.join(f'{value:.2f}' for value in box)} {rest}\n"


def kitti(root: Path) -> None:
    """Three images, one of them with a region that nobody has labelled."""
    for number in range(3):
        save_image(root / "training" / "image_2" / f"{number:06d}.png")
        save_image(root / "testing" / "image_2" / f"{number:06d}.png")
    write_text(root / "training" / "label_2" / "000000.txt", kitti_line("Car", (2, 3, 12, 23), "1 2 3 4 5 6 0.1"))
    lines = kitti_line("Person_sitting", (1, 2, 9, 8)) + kitti_line("DontCare", (20, 5, 30, 15))
    write_text(root / "training" / "label_2" / "000001.txt", lines)
    write_text(root / "training" / "label_2" / "000002.txt", kitti_line("Car", (1.5, 2.5, 9, 8)))


def visdrone(root: Path) -> None:
    folder = root / "VisDrone2019-DET-train"
    for name in ("a", "b"):
        save_image(folder / "images" / f"{name}.jpg")
    write_text(folder / "annotations" / "a.txt", "2,3,10,20,1,4,0,0\n1,1,5,5,1,1,0,0,\n20,5,10,10,0,0,0,0\n")
    write_text(folder / "annotations" / "b.txt", "2,3,10,20,0,11,0,0\n1,1,5,5,0,10,0,1\n")


def wider_face(root: Path) -> None:
    names = ["0--Parade/a.jpg", "0--Parade/b.jpg", "1--Handshaking/a.jpg"]
    for name in names:
        save_image(root / "WIDER_train" / "images" / name)
    text = (
        f"{names[0]}\n2\n2 3 10 20 0 0 0 0 0 0 \n1 1 5 5 2 0 0 1 2 0 \n"
        f"{names[1]}\n0\n0 0 0 0 0 0 0 0 0 0 \n{names[2]}\n1\n4 5 6 7 1 0 0 0 0 0 \n"
    )
    write_text(root / "wider_face_split" / "wider_face_train_bbx_gt.txt", text)


def mot(root: Path, sequence: str = "MOT17-02-FRCNN") -> None:
    """Three frames; boxes count pixels from 1."""
    folder = root / "MOT17" / "train" / sequence
    for frame in (1, 2, 3):
        save_image(folder / "img1" / f"{frame:06d}.jpg")
    rows = [
        "1,1,3,4,10,20,1,1,1",
        "1,2,1,1,5,5,0,1,0.5",
        "1,3,20,5,10,10,1,7,1",
        "1,4,20,5,10,10,1,3,1",
        "3,1,31,4,30,20,1,1,1",
    ]
    write_text(folder / "gt" / "gt.txt", "\n".join(rows))
    write_text(folder / "det" / "det.txt", "1,-1,3,4,10,20,0.9\n")
    info = f"name={sequence}\nimDir=img1\nframeRate=30\nseqLength=3\nimWidth=40\nimHeight=30\nimExt=.jpg\n"
    write_text(folder / "seqinfo.ini", f"[Sequence]\n{info}")


# Benchmarks whose names or ignored boxes are their own, so that the made-up truth does not fit them.
BENCHMARKS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "kitti": ("kitti", kitti),
    "visdrone": ("visdrone", visdrone),
    "wider face": ("wider_face", wider_face),
    "mot": ("mot", mot),
}
