"""Fine-tune transformers' Deformable DETR, begun from a METR, on a COCO folder: METR_RUN FOLDER OUT [STEPS]."""

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoImageProcessor, AutoModelForObjectDetection, Trainer, TrainingArguments

from metr.api.datasets import open_joint
from metr.api.transfer import transfer_run
from metr.data.images import read_image

run, folder, out, steps = (*sys.argv[1:], "500")[:4]
transfer_run(Path(run), "deformable_detr", Path(out), names=folder, console=Console())
processor: Any = AutoImageProcessor.from_pretrained(out)  # type: ignore[no-untyped-call]


def collate(records: list[Any]) -> dict[str, Any]:
    """Pictures and objects as the detector takes them."""
    told: list[Any] = [{"image_id": 0, "annotations": []} for _ in records]
    for one, to in zip(records, told, strict=True):
        for c, (x, y, r, b), crowd in zip(one.labels.tolist(), one.boxes.tolist(), one.ignore.tolist(), strict=True):
            to["annotations"] += [{"category_id": c, "bbox": [x, y, r - x, b - y], "area": 0, "iscrowd": crowd}]
    return {**processor([read_image(one.path) for one in records], told, return_tensors="pt")}


model, images = AutoModelForObjectDetection.from_pretrained(out), open_joint([folder]).sources[0].split("train")
Trainer(model, TrainingArguments(f"{out}/training", max_steps=int(steps), learning_rate=2e-4), collate, images).train()
model.save_pretrained(out)
