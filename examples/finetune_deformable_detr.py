"""Fine-tune Deformable DETR, begun from a METR that has `encoder.kind: deformable`: else only its backbone moves."""

import argparse
import sys
from functools import partial
from typing import Any

from rich.console import Console
from transformers import AutoImageProcessor, AutoModelForObjectDetection, Trainer, TrainingArguments

import metr
from metr.conversion.transfer import trainer_batch, trainer_images
from metr.errors import MetrError

parser = argparse.ArgumentParser(description=__doc__)
for place in ("METR_RUN", "FOLDER", "OUT"):
    parser.add_argument(place)
parser.add_argument("--steps", type=int, default=500)
run, folder, out, steps = vars(parser.parse_args()).values()
try:
    metr.transfer(run, "deformable_detr", out, names=folder, console=Console())
    processor: Any = AutoImageProcessor.from_pretrained(out)  # type: ignore[no-untyped-call]
    model = AutoModelForObjectDetection.from_pretrained(out)
    images: Any = trainer_images(folder, model)
    asked = TrainingArguments(f"{out}-training", max_steps=steps, learning_rate=2e-4)
    Trainer(model, asked, partial(trainer_batch, processor), images).train()
    model.save_pretrained(f"{out}-trained")
    processor.save_pretrained(f"{out}-trained")
except MetrError as error:
    sys.exit(str(error))
