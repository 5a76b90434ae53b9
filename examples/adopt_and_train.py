"""Begin with a public detector and train it jointly on several datasets: it finds its own names and theirs."""

import argparse
import sys

from rich.console import Console

import metr
from metr.errors import MetrError

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("source", help="user/name, user/name@revision, a folder of transformers, a .pth, or a METR")
parser.add_argument("data", nargs="+", help="folders, name=folder, or YAML files that list some")
parser.add_argument("--out", required=True, help="the run folder to write")
parser.add_argument("--set", action="append", default=[], help="a value of the recipe: train.loop.steps=5000")
given = parser.parse_args()
try:
    before = metr.METR.from_pretrained(given.source)
    print(f"it finds {', '.join(before.names)}")
    metr.train(given.data, given.out, start=given.source, overrides=given.set, console=Console())
    print(f"now it finds {', '.join(metr.METR.from_pretrained(given.out).names)}")
except MetrError as error:
    sys.exit(f"error: {error}")
