"""`import metr`: light, and every verb is there when it is asked for."""

import subprocess
import sys
from importlib import import_module
from inspect import isfunction

import pytest

import metr

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


def ended_well(script: str) -> str:
    """What a script prints in a process of its own."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
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


def test_detecting_does_not_import_the_compiler() -> None:
    """It takes more than a second, a third of the whole start."""
    script = "import sys, metr, metr.inference.detect_files; metr.METR; print('torch._dynamo' in sys.modules)"
    assert ended_well(script).split() == ["False"]
