"""Backbone, encoder and decoder compile into one graph each, and give the same numbers. See `compiled_network.py`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from metr.structures import Memory

from small import shipped_config, small_config

TESTS = Path(__file__).parents[1]
CONFIGS = {
    name: config.model_copy(update={"decoder": config.decoder.model_copy(update={"layers": 1})})
    for name, config in {
        "shipped": shipped_config(),
        "hybrid": small_config(encoder="hybrid"),
        "plain": small_config(encoder="plain"),
    }.items()
}


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("compiled") / "given.json"
    path.write_text(json.dumps({name: config.model_dump(mode="json") for name, config in CONFIGS.items()}))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(TESTS / "compiled_network.py"), str(path)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=1500)
    assert ended.returncode == 0, ended.stderr
    answers: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_compiled_parts_give_the_same_numbers_in_few_graphs(name: str, compared: dict[str, Any]) -> None:
    found = compared[name]
    assert found["breaks"] == 0
    assert found["difference"] < 1e-5
    # one graph a part for the first size, one more for any size; padding may be seen once more
    assert found["graphs"][0] == 3
    assert found["graphs"][-1] <= 9


def test_compiled_code_keeps_nothing_in_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    memory = Memory(
        tokens=torch.zeros(1, 4, 8),
        padding_mask=torch.zeros(1, 4, dtype=torch.bool),
        level_shapes=((2, 2),),
        valid_ratios=torch.ones(1, 1, 2),
    )
    with torch.no_grad():
        first, second = (memory.once("a module", lambda: torch.zeros(1)) for _ in range(2))
    assert first is not second
