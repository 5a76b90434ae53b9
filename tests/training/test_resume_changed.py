"""What changed between a run's start and its resumption is said, however it was changed; one process has a folder."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from metr.config import read_yaml
from metr.errors import ConfigError, MetrError
from metr.training.run_log import RunLog
from metr.training.train import train

from tiny import TinyRun


def began(tiny: TinyRun, tmp_path: Path) -> Path:
    shutil.copytree(tiny.folder, tmp_path / "run")
    return tmp_path / "run"


def key_of(tree: dict, ending: str) -> str:
    """The whole key of a setting."""
    from metr.config import leaves

    (found,) = [key for key in leaves(tree) if key.endswith(ending) and "evaluation" not in key]
    return found


@pytest.mark.parametrize("how", ["set", "config.yaml"])
@pytest.mark.parametrize("key", ["learning_rate", "batch_size", "loop.seed", "flip"])
def test_a_changed_setting_is_said(
    key: str, how: str, tiny_run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = began(tiny_run, tmp_path)
    tree = read_yaml(run / "config.yaml")
    whole = key_of(tree, {"learning_rate": "optimizer.learning_rate", "batch_size": "loader.batch_size"}.get(key, key))
    new = {"learning_rate": 0.005, "batch_size": 1, "loop.seed": 9, "flip": 0.1}[key]
    overrides = ["train.loop.steps=4"]
    if how == "set":
        overrides.append(f"{whole}={new}")
    else:
        *sections, last = whole.split(".")
        section = tree
        for name in sections:
            section = section[name]
        section[last] = new
        (run / "config.yaml").write_text(yaml.safe_dump(tree))
    train(None, run, resume=True, overrides=overrides)
    said = [line.split("configuration: ")[1] for line in caplog.text.splitlines() if "another configuration" in line]
    assert sorted(line.split(":")[0] for line in said) == sorted(["train.loop.steps", whole])
    assert any(line.startswith(f"{whole}: ") and line.endswith(f" -> {new}") for line in said)


def test_a_dataset_under_another_name_is_said(
    tiny_run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = began(tiny_run, tmp_path)
    listing = run / "datasets.yaml"
    first = read_yaml(listing)["datasets"][0]["name"]
    listing.write_text(listing.read_text().replace(f"name: {first}", "name: other"))
    with pytest.raises(ConfigError, match="the run has other datasets"):
        train(None, run, resume=True, overrides=["train.loop.steps=4"])
    assert f"not there any more: {first}" in caplog.text
    assert "other: the run was begun without this dataset" in caplog.text


_HOLD = """
import sys, time
from pathlib import Path
from metr.training.run_log import RunLog
with RunLog(Path(sys.argv[1])) as log:
    log.begin("cpu")
    print("held", flush=True)
    time.sleep(100)
"""


def test_one_process_at_a_time_trains_in_a_folder(tiny_run: TinyRun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", _HOLD, run], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(MetrError, match="another process trains in this folder"):
            train(tiny_run.data, run, tiny_run.recipe)
        assert not (run / "config.yaml").exists()
        holder.kill()
        holder.wait()
    with RunLog(run) as log:
        log.begin("cpu")
