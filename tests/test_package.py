"""`import metr`: light, and every verb is there when it is asked for."""

import subprocess
import sys
from importlib import import_module
from inspect import isfunction
from pathlib import Path

import pytest

import metr

SHIPPED = Path(__file__).resolve().parents[1] / "checkpoints" / "metr-nano"
HEAVY = ("torch", "transformers", "pyarrow", "cv2", "matplotlib", "numpy", "pydantic", "huggingface_hub")
REGISTERED = """
import sys
import metr
assert not set(sys.modules) & {HEAVY}, set(sys.modules) & {HEAVY}
metr.register()
metr.register()
from transformers import AutoBackbone, AutoConfig
config = AutoConfig.for_model("efficientnet_lite", width=0.25, depth=0.5, out_features=["stage3"])
print(type(AutoBackbone.from_config(config)).__name__)
"""


def ended_well(script: str, *arguments: object) -> str:
    """What a script prints in a process of its own."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_importing_metr_imports_nothing_heavy_and_registering_is_asked_for() -> None:
    script = REGISTERED.replace("{HEAVY}", repr(set(HEAVY)))
    assert ended_well(script).split()[-1] == "EfficientNetLiteModel"


@pytest.mark.parametrize("name", sorted(set(metr.__all__) - {"METR", "__version__"}))
def test_every_verb_is_a_function(name: str) -> None:
    found = getattr(metr, name)
    assert isfunction(found)
    assert found.__name__ == name
    assert found is getattr(import_module(found.__module__), name)
    assert found.__doc__


def test_what_there_is_and_what_there_is_not() -> None:
    assert {*metr.__all__, "__doc__"} <= set(dir(metr))
    assert metr.METR.__module__ == "metr.model"
    with pytest.raises(AttributeError, match="module 'metr' has no attribute 'trian'"):
        metr.trian  # noqa: B018


def test_detecting_imports_neither_training_nor_dataset_formats() -> None:
    script = "import sys, metr; metr.METR; print(*(name for name in sys.modules if name.startswith('metr.')))"
    parts = ("conversion", "sharing", "training", "evaluation", "inspection", "data.formats", "data.index", "cli")
    assert not [name for name in ended_well(script).split() if name.startswith(tuple(f"metr.{part}" for part in parts))]


DETECTED = """
import sys
import numpy as np
from PIL import Image
from metr.inference.detect_files import detect_files
from metr.model import METR
Image.fromarray(np.full((64, 64, 3), 90, dtype=np.uint8)).save("a.png")
model = METR.from_pretrained({FOLDER}, device="cpu")
detect_files(model.predictor(), ["a.png"], Path("out"), thresholds=model.thresholds(0.0))
print(*sys.modules)
"""


def test_detecting_imports_only_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of these each takes from a tenth of a second to several, which was more than all else together."""
    monkeypatch.chdir(tmp_path)
    imported = ended_well("from pathlib import Path" + DETECTED.replace("{FOLDER}", repr(str(SHIPPED)))).split()
    assert not {"torch._dynamo", "transformers", "matplotlib", "fsspec", "scipy", "accelerate"} & set(imported)


MISTAKEN = """
import sys
from metr.cli.main import run
try:
    run()
except SystemExit as end:
    print(end.code, "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    "command",
    [
        ["detect", SHIPPED, "no.jpg"],
        ["detect", "no/run/here", "a.jpg"],
        ["detect", SHIPPED, "a.jpg", "--labels", "name"],
        ["evaluate", "no/run/here", "data"],
        ["complete", "data", "--model", "no/run/here", "-o", "out"],
        ["finetune", "data", "--from", "no/run/here", "-o", "run"],
        ["transfer", "no/run/here", "--to", "detr", "-o", "out"],
        ["push", "no/run/here", "user/name"],
    ],
    ids=lambda command: " ".join(map(str, command[:1])),
)
def test_what_is_not_there_is_told_before_torch_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[object]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jpg").touch()
    assert ended_well(MISTAKEN, *command).split() == ["1", "False"]
