"""Training whose draws follow the losses, as a user asks for it."""

from pathlib import Path

import pytest

from metr.data.mixture import mixture_weights
from metr.training.metrics import read_metrics
from metr.training.recipe import load_recipe
from metr.training.train import train

from tiny import NAMES, TinyRun


def test_weights_of_datasets_are_what_losses_multiply(tiny_run: TinyRun, tmp_path: Path) -> None:
    lines = [f"  - {{path: {path}, weight: {2 if path.name == 'pond' else 1}}}" for path in tiny_run.datasets]
    (tmp_path / "list.yaml").write_text("\n".join(["datasets:", *lines]), encoding="utf-8")
    overrides = ["loader.mixture=hardness", "loader.hardness.every=1", "loader.repeat_threshold=0.9"]
    recipe = load_recipe("nano", tiny_run.recipe, overrides)
    train([str(tmp_path / "list.yaml")], tmp_path / "run", recipe)
    records = [one for one in read_metrics(tmp_path / "run") if one["kind"] == "train"]
    base = mixture_weights(dict.fromkeys(NAMES, 4), {name: 2.0 if name == "pond" else 1.0 for name in NAMES})
    assert records[0]["shares"] == pytest.approx(base)
    assert records[2]["shares"] != pytest.approx(base)
    loss = records[0]["box_loss"]
    usual = sum(loss.values()) / len(loss)
    share = {name: base[name] * loss.get(name, usual) for name in NAMES}
    assert records[1]["shares"] == pytest.approx({name: one / sum(share.values()) for name, one in share.items()})
