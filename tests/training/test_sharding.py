"""Sharding (`train.parallel: fsdp`): two processes that keep a half each make the steps of one with everything."""

import json
import logging
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from metr.checkpoint import load_checkpoint
from metr.errors import ConfigError, MetrError
from metr.models.detector import Detector
from metr.training.engine import Engine
from metr.training.logger import read_metrics
from metr.training.optimization import backbone_stages
from metr.training.parts import Evaluated
from metr.training.sharding import blocks
from metr.training.trainer import Trainer
from small_runs import make_config, make_parts
from two_processes import launched

from small import small_config

STEPS = 20
# as in test_distributed: all that a process could compute or draw for itself, and no whole steps of rounding errors
NETWORK: dict[str, Any] = {"encoder": "hybrid", "denoising": 20, "size": 64}
CHANGES: dict[str, Any] = {
    "optimizer": {"epsilon": 1e-2},
    "loop": {"log_every": 1, "evaluate_every": 10, "vocabulary_sample": 3},
}
EQUALLY = f"""
import os, sys
from pathlib import Path
from metr.training.parts import Evaluated
from metr.training.trainer import Trainer
from small_runs import make_config, make_parts
folder, calls = Path(sys.argv[1]), []
data = folder / f"data-{{os.environ['RANK']}}"  # no process reads what the other is just writing

def run(name, parallel, stop=0):
    parts = make_parts(data, batch_size=2, **{NETWORK!r})
    config = make_config({STEPS}, parallel=parallel, **{CHANGES!r})
    def evaluate(network):
        # any process may call the network that it is given, as often as it likes
        calls.append(type(network).__name__)
        images = trainer.parts.loader(seed=0, start=0, rank=0, world=1, device=trainer.device)
        batch = next(iter(images))
        for _ in range(1 + trainer.accelerator.process_index):
            found = network(batch.images, batch.padding_mask, parts.checkpoint.text_embeddings)
        return Evaluated(metrics={{"AP": 0.0 * float(found.logits.sum())}})  # as alone
    trainer = Trainer(parts, config, folder / name, evaluate=evaluate)
    def ask(module, inputs):
        trainer._stop_signals.requested |= trainer.counters.step + 1 == stop
    if trainer.accelerator.process_index == 1:
        trainer.plain_network.register_forward_pre_hook(ask)
    return trainer.fit(resume=True).step

assert [run("sharded", "fsdp", 13), run("sharded", "fsdp")] == [13, {STEPS}]
assert set(calls) <= {{"Detector"}}, "a plain network is evaluated"
assert [run("changing", "ddp", 6), run("changing", "fsdp", 13), run("changing", "ddp")] == [6, 13, {STEPS}]
assert run("from one", "fsdp") == {STEPS}
assert run("to one", "fsdp", 12) == 12
"""
ALIKE = """
import json, os, sys
from dataclasses import replace
from pathlib import Path
import torch
from torch.distributed.tensor import DTensor
from metr.structures import Losses
from metr.training.config import PseudoLabelConfig
from metr.training.step_targets import PseudoLabeler
from metr.training.trainer import Trainer
from small_runs import make_config, make_parts
folder = Path(sys.argv[1])

def fault(module, inputs, outputs):
    # the loss of the other process is not finite, once
    losses, matches = outputs
    if trainer.counters.step == 1 and trainer.accelerator.process_index == 1:
        losses = Losses(terms={name: value * torch.nan for name, value in losses.items()})
    return losses, matches

def overflow(optimizer, limit):
    norm = clip(optimizer, limit)
    return norm * torch.inf if trainer.counters.step == 2 else norm

for name, (network, changes) in json.loads((folder / "cases.json").read_text()).items():
    for parallel in ("ddp", "fsdp"):
        parts = make_parts(folder / f"data-{os.environ['RANK']}", batch_size=2, **network)
        if name == "pseudo-labels":
            unknown = {dataset: torch.tensor([n % 2 == 0 for n in range(4)]) for dataset in ("cells", "fish")}
            eager = PseudoLabelConfig(present_above=0.01, object_above=0.01, absent_below=0.005)
            parts = replace(parts, teacher=PseudoLabeler(eager, unknown))
        # as above: no whole steps of rounding errors
        changes["optimizer"] = {"epsilon": 1e-2} | changes.get("optimizer", {})
        config = make_config(4, parallel=parallel, **changes)
        trainer = Trainer(parts, config, folder / name / parallel)
        if name.startswith("faults"):
            trainer.criterion.register_forward_hook(fault)
            clip, trainer.engine.clip_gradient = trainer.engine.clip_gradient, overflow
        trainer.fit()
        if parallel == "fsdp":
            assert all(isinstance(parameter, DTensor) for parameter in trainer.plain_network.parameters())
    # the bytes that this process keeps of network, average and moments, counted
    average = [] if trainer.ema is None else [*trainer.ema.network.parameters()]
    moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
    kept = [*trainer.plain_network.parameters(), *average, *moments]
    local = [each.to_local() if isinstance(each, DTensor) else each for each in kept]
    size = sum(each.numel() * each.element_size() for each in local)
    whole = sum(each.numel() * each.element_size() for each in kept)
    (folder / name / f"bytes-{trainer.accelerator.process_index}.json").write_text(json.dumps([size, whole]))
"""
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "faults, frozen, by depth": (
        {"encoder": "hybrid"},
        {"freeze": "half", "optimizer": {"layer_decay": 0.7}, "loop": {"max_skipped": 3}},
    ),
    "pseudo-labels": ({}, {}),
    "accumulated, not clipped": (
        {"encoder": "deformable"},
        {"optimizer": {"clip_norm": 0}, "loop": {"accumulation": 2}},
    ),
    "bf16, no average, backbone without a rate": (
        {"encoder": "plain"},
        {"ema": {"enabled": False}, "optimizer": {"backbone_multiplier": 0}, "loop": {"precision": "bf16"}},
    ),
}


def assert_equal_runs(ours: Path, theirs: Path, within: float = 1e-4) -> None:
    """Losses of every step, and all tensors at the end: network, average, optimizer, checkpoints."""
    records, expected = ([r for r in read_metrics(run) if r["kind"] == "train"] for run in (ours, theirs))
    assert [record["step"] for record in records] == [record["step"] for record in expected]
    for record, other in zip(records, expected, strict=True):
        assert record["images"] == other["images"]
        assert record["losses"] == pytest.approx(other["losses"], rel=1e-5, abs=1e-5), (ours, record["step"])
        assert record["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-3)
    files = [path.relative_to(theirs) for path in theirs.rglob("*.safetensors") if path.stem != "random"]
    assert len(files) >= 4
    for file in files:
        found, wanted = load_file(ours / file), load_file(theirs / file)
        assert found.keys() == wanted.keys(), file
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, atol=within, rtol=within, msg=f"{ours.name}/{file}: {name}")


def test_blocks_are_stages_and_members_of_lists() -> None:
    network = Detector(small_config(encoder="hybrid"), 16)
    names = {module: name for name, module in network.named_modules()}
    found = [names[block] for block in blocks(network)]
    assert len(found) == len({*found})
    lists = (
        "encoder.layers",
        "encoder.down_fusions",
        "encoder.up_fusions",
        "decoder.layers",
        "category_extraction.blocks",
    )
    for name in lists:
        assert f"{name}.0" in found
    assert {names[stage[0]] for stage in backbone_stages(network.backbone)[1:]} <= {*found}
    assert not any(one != other and other.startswith(f"{one}.") for one in found for other in found), "none in another"


def test_one_process_has_nothing_to_shard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "metr"):
        trainer = Trainer(make_parts(tmp_path), make_config(2, parallel="fsdp"), tmp_path / "run")
    assert "this is the only process, so there is nothing to shard" in caplog.text
    assert type(trainer.engine) is Engine
    assert trainer.fit().step == 2


def test_a_torch_that_cannot_shard_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from metr.training import engine

    monkeypatch.delitem(sys.modules, "metr.training.sharding", raising=False)
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", None)
    monkeypatch.delattr("torch.distributed.fsdp.fully_shard")
    two = Mock(spec=Accelerator, num_processes=2)
    with pytest.raises(MetrError, match=r"cannot shard a network .*fully_shard") as raised:
        engine.build_engine("fsdp", two, torch.nn.Linear(1, 1), averaged=False)
    assert raised.value.where == "train.parallel"
    assert "torch 2.11" in str(raised.value.hint)


@pytest.mark.parametrize("option", ["fsdp", "deepspeed", "megatron_lm"])
def test_what_accelerate_would_shard_with_is_refused(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{option.upper()}", "true")
    with pytest.raises(ConfigError, match=rf"--use_{option}.*train\.parallel=fsdp"):
        Trainer(make_parts(tmp_path), make_config(2), tmp_path / "run")


@pytest.mark.trains
@pytest.mark.slow
def test_processes_with_a_half_each_make_the_steps_of_one_with_everything(tmp_path: Path) -> None:
    """Also if they are stopped, and go on sharded, not sharded, alone."""

    def alone(name: str, stop: int = 0) -> Trainer:
        config = make_config(STEPS, **CHANGES)
        trainer = Trainer(make_parts(tmp_path, batch_size=4, **NETWORK), config, tmp_path / name, evaluate=judge)

        def ask(*_: object) -> None:
            trainer._stop_signals.requested |= trainer.counters.step + 1 == stop

        trainer.plain_network.register_forward_pre_hook(ask)
        assert trainer.fit(resume=True).step == (stop or STEPS)
        return trainer

    def judge(network: torch.nn.Module) -> Evaluated:
        return Evaluated(metrics={"AP": 0.0})

    alone("alone")
    alone("from one", stop=8)
    launched(EQUALLY, tmp_path)
    alone("to one")
    for name in ("sharded", "changing", "from one", "to one"):
        assert_equal_runs(tmp_path / name, tmp_path / "alone")
    weights = load_checkpoint(tmp_path / "sharded").weights
    assert {name: value.shape for name, value in weights.items()} == {
        name: value.shape for name, value in load_checkpoint(tmp_path / "alone").weights.items()
    }
    random = load_file(tmp_path / "sharded" / "state" / "random.safetensors")
    assert all(len(rows) == 2 for rows in random.values())


@pytest.mark.trains
@pytest.mark.slow
def test_sharded_processes_do_what_processes_with_whole_networks_do(tmp_path: Path) -> None:
    (tmp_path / "cases.json").write_text(json.dumps(CASES))
    launched(ALIKE, tmp_path)
    for name in CASES:
        assert_equal_runs(tmp_path / name / "fsdp", tmp_path / name / "ddp", within=1e-5)
        counters = [json.loads((tmp_path / name / one / "state" / "state.json").read_text()) for one in ("ddp", "fsdp")]
        assert {each["skipped"] for each in counters} == {2 if name.startswith("faults") else 0}
        sizes = [json.loads((tmp_path / name / f"bytes-{rank}.json").read_text()) for rank in range(2)]
        (first, whole), (second, _) = sizes
        assert max(first, second) < 0.6 * whole
