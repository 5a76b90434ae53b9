"""Train one detector on several datasets that label different things, and look for their objects in an image."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

import metr
from metr.errors import MetrError
from metr.training.config import load_recipe

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("data", nargs="+", help="folders, name=folder, or YAML files that list some")
parser.add_argument("--out", type=Path, required=True, help="the run folder to write")
parser.add_argument("--image", type=Path, required=True)
parser.add_argument("--set", action="append", default=[], help="a value of the recipe: train.loop.steps=5000")
given = parser.parse_args()
try:
    metr.train(given.data, given.out, load_recipe("nano", overrides=given.set), console=Console())
    found = metr.METR.from_pretrained(given.out).detect(given.image)
    print(f"{len(found)} objects, looked for: {', '.join(found.names)}")
except MetrError as error:
    sys.exit(f"error: {error}")
