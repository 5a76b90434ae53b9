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
SMALL: dict[str, DetectorConfig] = {
    "deformable": small_config(),
    "hybrid": small_config(encoder="hybrid"),
    "plain": small_config(encoder="plain"),
    "projector": small_config(encoder="projector"),
    "shared": small_config(layout="shared"),
    "budget": small_config(layout="budget"),
    "image": small_config(attention="image"),
    "no denoising": small_config(denoising=0),
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


def test_the_network_of_recipes_in_small_stays_on_its_device(tmp_path: Path) -> None:
    assert faults(tmp_path, {"shipped": {"model": shipped_config().model_dump(mode="json")}}) == {"shipped": []}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    given = {name: {"model": config.model_dump(mode="json")} for name, config in SMALL.items()}
    for kind in ("focal", "quality", "matchability"):
        given[kind] = given["deformable"] | {"criterion": {"classification": kind}}
    long = small_config().model_dump(mode="json")
    given["shortlist"] = {"model": long | {"categories": long["categories"] | {"shortlist": 6}}}
    return faults(tmp_path_factory.mktemp("small"), given)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SMALL, "focal", "quality", "matchability", "shortlist"])
def test_small_networks_stay_on_their_device(name: str, small: dict[str, list[str]]) -> None:
    assert small[name] == []


@pytest.mark.slow
def test_the_networks_of_all_recipes_stay_on_their_device(tmp_path: Path) -> None:
    assert faults(tmp_path, recipes()) == {size: [] for size in SIZES}
