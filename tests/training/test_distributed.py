"""Two processes: each sees its share of the draws, and together they make the steps of one with twice the batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from metr.training.logger import read_metrics
from metr.training.trainer import Trainer
from small_runs import make_config, make_parts

# Without denoising, whose random numbers differ from process to process.
SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from metr.training.trainer import Evaluated, Trainer
from small_runs import make_config, make_parts

def run(stop):
    parts = make_parts(Path(sys.argv[1]), batch_size=2, denoising=0)
    config = make_config(4, loop={"log_every": 1, "evaluate_every": 2})
    evaluate = lambda network: Evaluated(metrics={"AP": float(next(network.parameters()).abs().sum())})
    trainer = Trainer(parts, config, Path(sys.argv[1]) / "run", evaluate=evaluate)
    def ask(module, inputs):
        trainer._stop_signals.requested |= trainer.counters.step + 1 == stop
    if trainer.accelerator.process_index == 1:
        trainer.plain_network.register_forward_pre_hook(ask)
    return trainer.fit(resume=True).step

assert [run(stop=3), run(stop=0)] == [3, 4], "both stop when the second is asked to, and go on"
"""


def launch(folder: Path) -> None:
    """Runs the script in two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [sys.executable, "-c", SCRIPT, str(folder), *(str(path) for path in Path(__file__).parents[:2])]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    workers = [subprocess.Popen(arguments, env={**os.environ, **shared, **rank}) for rank in ranks]
    assert [worker.wait(timeout=240) for worker in workers] == [0, 0]


@pytest.mark.trains
@pytest.mark.slow
def test_two_processes_make_the_steps_of_one(tmp_path: Path) -> None:
    make_parts(tmp_path)  # writes the images before two processes do
    launch(tmp_path)

    config = make_config(4, loop={"log_every": 1})
    alone = Trainer(make_parts(tmp_path, batch_size=4, denoising=0), config, tmp_path / "alone")
    alone.fit()
    ours, theirs = read_metrics(tmp_path / "run"), read_metrics(tmp_path / "alone")
    training = [record for record in ours if record["kind"] == "train"]
    assert [record["step"] for record in training] == [1, 2, 3, 4]
    assert [record["step"] for record in ours if record["kind"] == "evaluation"] == [2, 4], "one process writes"
    for record, expected in zip(training, theirs, strict=True):
        assert record["images"] == expected["images"]
        assert record["epochs"] == expected["epochs"]
        assert record["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-3)
    trained, expected = load_file(tmp_path / "run" / "state" / "network.safetensors"), alone.plain_network.state_dict()
    for name, value in trained.items():
        torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=1e-3, msg=name)
    random = load_file(tmp_path / "run" / "state" / "random.safetensors")
    assert all(len(rows) == 2 for rows in random.values())
    assert not torch.equal(*random["torch.cpu"])
