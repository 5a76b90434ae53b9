"""What changed between a run's start and its resumption is said, however it was changed; one process has a folder."""

import json
import shutil
import socket
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants
from rich.console import Console

from metr.cli import training as command_line
from metr.config import merge, read_yaml, unflattened
from metr.errors import ConfigError, MetrError
from metr.run_directory import RunDirectory
from metr.text.vocabulary import Vocabulary
from metr.training.finetune import finetune
from metr.training.resumed_recipe import resumed_recipe
from metr.training.run_log import RunLog
from metr.training.train import train
from metr.training.train_request import check_same

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


def test_a_changed_setting_is_told_once(tiny_run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With a header that tells it nothing tells it again; also what was changed by hand is told there."""
    run = began(tiny_run, tmp_path)
    tree = read_yaml(run / "config.yaml")
    (run / "config.yaml").write_text(yaml.safe_dump(merge(tree, unflattened({"augmentation.flip": 0.25}))))
    console = Console(file=StringIO(), width=10_000)
    train(None, run, resume=True, overrides=["train.loop.steps=5", "loader.batch_size=4"], console=console)
    said: str = console.file.getvalue()  # type: ignore[attr-defined]
    assert "another configuration" not in caplog.text
    assert "steps: 3 made, 2 to go of 4 images, 14 images in all, 1.2 epochs;" in said
    for change in ("augmentation.flip: 0.5 -> 0.25", "train.loop.steps: 3 -> 5", "loader.batch_size: 2 -> 4"):
        assert said.count(change.partition(":")[0]) == 1, change
        assert f"  {change}\n" in said


def test_a_run_of_the_other_command_is_said_with_the_command_that_goes_on(tiny_run: TinyRun, tmp_path: Path) -> None:
    run = began(tiny_run, tmp_path)
    with pytest.raises(ConfigError, match="the run was begun with metr train, and metr finetune cannot") as caught:
        finetune(None, None, run, resume=True)
    assert f"try: metr train --resume -o {run}" in str(caught.value)
    (run / "training.json").rename(run / "finetuning.json")
    with pytest.raises(ConfigError, match="the run was begun with metr finetune, and metr train cannot") as caught:
        train(None, run, resume=True)
    assert f"try: metr finetune --resume -o {run}" in str(caught.value)


def test_what_was_not_asked_for_at_first_is_said(tiny_run: TinyRun, tmp_path: Path) -> None:
    run = began(tiny_run, tmp_path)
    with pytest.raises(ConfigError, match="the run was begun with no shots, now 5"):
        train(None, run, resume=True, shots=5)
    with pytest.raises(ConfigError, match="the run was begun with no detector, now --from names one"):
        train(None, run, resume=True, start=tiny_run.folder)
    names = [f"thing {number}" for number in range(80)]
    with pytest.raises(ConfigError, match="only here: thing 0, thing 1, thing 10, thing 11, thing 12 and 75 more"):
        check_same(RunDirectory(run), Vocabulary.union({"many": names}))


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


@pytest.fixture
def nothing_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection, no dataset and no language model: a refusal has to come before all of them."""

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("opened before the refusal")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", opened)
    monkeypatch.setattr(socket, "getaddrinfo", opened)
    monkeypatch.setattr("metr.training.train_request.open_joint", opened)
    monkeypatch.setattr("metr.text.language_model.configuration", opened)


@pytest.mark.usefixtures("nothing_is_opened")
@pytest.mark.parametrize("how", ["set", "file", "config.yaml"])
@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("text.source", "openai/clip-vit-base-patch32", "found openai/clip-vit-base-patch32, which is no folder here"),
        ("text.source", "./texts/moved", "found ./texts/moved, which is no folder here"),
        ("text.pooling", "cls", "text.pooling auto, now cls"),
        ("text.templates", ["{}", "one {}"], "now ['{}', 'one {}']"),
        ("model.backbone.name", "facebook/dinov2-small", "now facebook/dinov2-small"),
        ("model.decoder.layers", 4, "model.decoder.layers"),
        ("model.queries.number", 77, "model.queries.number"),
        ("train.freeze", "encoder", "train.freeze none, now encoder"),
    ],
)
def test_what_cannot_change_is_refused_before_anything_is_opened(
    how: str, key: str, value: object, told: str, tiny_run: TinyRun, tmp_path: Path
) -> None:
    run = began(tiny_run, tmp_path)
    given: dict = {"set": {"overrides": [f"{key}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}"]}}
    changed = unflattened({key: value})
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(changed))
    if how == "config.yaml":
        (run / "config.yaml").write_text(yaml.safe_dump(merge(read_yaml(run / "config.yaml"), changed)))
    given |= {"file": {"config": tmp_path / "more.yaml"}, "config.yaml": {}}
    with pytest.raises(ConfigError) as refused:
        train(None, run, resume=True, **given[how])
    assert "a resumed run keeps its" in str(refused.value)
    assert told in str(refused.value)
    assert "start a new run in another folder" in str(refused.value)


@pytest.mark.usefixtures("nothing_is_opened")
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"text.source": "sentence-transformers/other"}, "at commit abc123, found sentence-transformers/other"),
        ({"text.revision": "v2"}, "at commit abc123, found v2"),
        ({"train.ema.enabled": True}, "train.ema.enabled false, now true"),
    ],
)
def test_a_text_encoder_of_the_hub_and_a_missing_average(
    changes: dict[str, object], told: str, tiny_run: TinyRun, tmp_path: Path
) -> None:
    run = began(tiny_run, tmp_path)
    last, settings = run / "last/config.json", run / "state/settings.json"
    facts, saved = json.loads(last.read_text()), json.loads(settings.read_text())
    facts["text_encoder"]["identity"] = "bert commit:abc123 mean templates:0 scheme:1"
    last.write_text(json.dumps(facts))
    kept = {"text.source": "sentence-transformers/some", "train.ema.enabled": False}
    settings.write_text(json.dumps({**saved, **kept}))
    tree = merge(read_yaml(run / "config.yaml"), unflattened(kept))
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    for same in ([], ["text.revision=abc123"], ["train.ema.enabled=false"]):
        assert resumed_recipe(RunDirectory(run), None, same)[0].text.source == kept["text.source"]
    with pytest.raises(ConfigError) as refused:
        train(
            None,
            run,
            resume=True,
            overrides=[f"{key}={yaml.safe_dump(value).split()[0]}" for key, value in changes.items()],
        )
    assert told in str(refused.value)


@pytest.mark.usefixtures("nothing_is_opened")
def test_a_text_encoder_whose_folder_is_gone_is_not_looked_for_on_the_hub(tiny_run: TinyRun, tmp_path: Path) -> None:
    run = began(tiny_run, tmp_path)
    for text in (run / "config.yaml", run / "state/settings.json"):
        text.write_text(text.read_text().replace(str(tiny_run.text_model), "gone/text"))
    with pytest.raises(
        ConfigError, match="expected the folder gone/text, which is not there\n  try: if the folder was"
    ):
        train(None, run, resume=True)


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
        with pytest.raises(MetrError, match="nothing to resume yet: another process trains in this folder"):
            train(None, run, resume=True)
        holder.kill()
        holder.wait()
    with RunLog(run) as log:
        log.begin("cpu")


def test_a_run_that_is_being_trained_is_not_opened_a_second_time(tiny_run: TinyRun, tmp_path: Path) -> None:
    """It is told before the plan, which takes long to make."""
    run, console = began(tiny_run, tmp_path), Console(file=StringIO())
    with RunLog(run) as log:
        log.begin("cpu")
        with pytest.raises(MetrError, match="another process trains in this folder"):
            train(None, run, resume=True, console=console)
        with pytest.raises(MetrError, match="another process trains in this folder"):
            command_line.train(out=run, resume=True)
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]
