"""Fine-tune a detector of transformers (--to) that begins with a METR's weights, and evaluate it on the val split."""

import argparse
import sys
from functools import partial
from typing import Any

from rich.console import Console
from transformers import AutoImageProcessor, AutoModelForObjectDetection, Trainer, TrainingArguments

import metr
from metr.conversion.transfer import trainer_batch, trainer_images, trainer_result
from metr.errors import MetrError

parser = argparse.ArgumentParser(description=__doc__)
for name, default in {"METR_RUN": None, "DATA": None, "OUT": None, "--to": "rt_detr", "--steps": 500}.items():
    parser.add_argument(name, default=default, type=type(default or ""))
run, data, out, to, steps = vars(parser.parse_args()).values()
try:
    metr.transfer(run, to, out, names=data, console=Console())
    processor: Any = AutoImageProcessor.from_pretrained(out)  # type: ignore[no-untyped-call]
    model = AutoModelForObjectDetection.from_pretrained(out)
    images: Any = trainer_images(data, model)
    asked = TrainingArguments(f"{out}-training", max_steps=steps, learning_rate=2e-4)
    Trainer(model, asked, partial(trainer_batch, processor), images).train()
    Console().print("AP on val:", trainer_result(data, model, processor).ap)
    model.save_pretrained(f"{out}-trained")
    processor.save_pretrained(f"{out}-trained")
except MetrError as error:
    sys.exit(str(error))
