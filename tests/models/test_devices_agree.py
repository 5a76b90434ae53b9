"""Nothing in the network or the losses is made on another device than the inputs, nor copied while the host waits.

See `fake_device.py`: a device without kernels, on which mixing devices is the error that it is on a GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils import backend_registration

from metr.models.config import DetectorConfig
from metr.training.config import SIZES, load_recipe

from small import shipped_config, small_config

TESTS = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot register a device in Python",
)
SMALL: dict[str, tuple[DetectorConfig, str]] = {
    "shipped": (shipped_config(), "quality"),
    "deformable, budget": (small_config(layout="budget"), "focal"),
    "hybrid, shared": (small_config(encoder="hybrid", layout="shared"), "matchability"),
    "plain, image": (small_config(encoder="plain", attention="image"), "quality"),
    "projector, no denoising": (small_config(encoder="projector", denoising=0), "focal"),
}


def recipes() -> dict[str, Any]:
    """The networks and losses of all recipes, without pretrained weights."""
    found = {}
    for size in SIZES:
        recipe = load_recipe(size, changes={"model": {"backbone": {"pretrained": False}}})
        found[size] = {"model": recipe.model.model_dump(mode="json"), "criterion": recipe.criterion.model_dump()}
    return found


def faults(folder: Path, given: dict[str, Any]) -> dict[str, list[str]]:
    path = folder / "given.json"
    path.write_text(json.dumps(given), encoding="utf-8")
    command = [sys.executable, str(TESTS / "fake_device.py"), str(path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=500)
    assert ended.returncode == 0, ended.stderr
    answers: dict[str, list[str]] = json.loads(ended.stdout.splitlines()[-1])
    return answers


@pytest.mark.slow
def test_small_networks_stay_on_their_device(tmp_path: Path) -> None:
    given = {
        name: {"model": config.model_dump(mode="json"), "criterion": {"classification": kind}}
        for name, (config, kind) in SMALL.items()
    }
    long = given["shipped"]["model"]
    given["shortlist"] = {"model": long | {"categories": long["categories"] | {"shortlist": 6}}}
    assert faults(tmp_path, given) == {name: [] for name in given}


@pytest.mark.slow
def test_the_networks_of_all_recipes_stay_on_their_device(tmp_path: Path) -> None:
    assert faults(tmp_path, recipes()) == {size: [] for size in SIZES}
