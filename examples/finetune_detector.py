"""Fine-tune a detector of transformers that begins with a METR's weights: AP on val before and after.

It writes OUT (the start), OUT-training (the Trainer's checkpoints) and OUT-trained (the result).
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoImageProcessor, AutoModelForObjectDetection, Trainer, TrainingArguments

import metr
from metr.conversion.transfer import trainer_batch, trainer_images, trainer_result
from metr.errors import MetrError

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", metavar="METR_RUN", help="a run or checkpoint of METR")
parser.add_argument("data", metavar="DATA", help="a dataset with train and val images, as commands of METR take it")
parser.add_argument("out", metavar="OUT", type=Path, help="a new folder")
parser.add_argument("--to", default="rt_detr", help="the detector; metr transfer --help lists them")
parser.add_argument("--steps", type=int, default=500, help="steps of 8 images; 500 by default")
given = parser.parse_args()
if given.steps < 1:
    parser.error(f"argument --steps: expected at least 1, found {given.steps}")
training, trained = (f"{given.out}-{what}" for what in ("training", "trained"))
if there := [folder for folder in (training, trained) if Path(folder).exists()]:
    sys.exit(f"error: {', '.join(there)}: already there, and not overwritten\n  try: another OUT, or move them away")
try:
    report = metr.transfer(given.run, given.to, given.out, names=given.data, steps=0)
    Console().print(report.table(), *report.notes, sep="\n", markup=False)
    every = max(1, given.steps // 5)
    asked = TrainingArguments(training, max_steps=given.steps, learning_rate=2e-4, save_steps=every, save_total_limit=2)
    processor: Any = AutoImageProcessor.from_pretrained(given.out)  # type: ignore[no-untyped-call]
    model = AutoModelForObjectDetection.from_pretrained(given.out).to(asked.device)
    images: Any = trainer_images(given.data, model)
    print("evaluating before the first step", flush=True)
    before = trainer_result(given.data, model, processor).ap
    print(f"AP {before:.1f}; {len(images)} training images, {given.steps} steps of {asked.train_batch_size}")
    print(f"the bar says how long it takes; checkpoints go to {training}, one at every fifth of the steps", flush=True)
    Trainer(model, asked, partial(trainer_batch, processor), images, processing_class=processor).train()
    model.save_pretrained(trained)
    processor.save_pretrained(trained)
    after = trainer_result(given.data, model, processor).ap
    print(f"AP on val: {after:.1f}, before the first step {before:.1f}")
    print(f"the trained detector is in {trained}; try it: metr detect {trained} IMAGE")
except MetrError as error:
    sys.exit(f"error: {error}")
