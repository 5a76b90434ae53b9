"""Folders of models that bring code: nothing of it runs, whoever waits at the keyboard with a "y"."""

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import metr as package
from metr.conversion.adoption import from_detector
from metr.conversion.import_ import read_published
from metr.errors import MetrError, ModelError
from metr.models.backbones import build_backbone
from metr.models.config import BackboneConfig
from metr.text.language_model import LanguageModel, LanguageModelSource

from tiny import CommandLine, TinyRun, metr, tiny_run, write_text_model

__all__ = ["metr", "tiny_run"]

_CODE = """
from pathlib import Path
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

Path({marker!r}).write_text("ran")


class Config(BertConfig):
    model_type = "stranger"


class Model(BertModel):
    config_class = Config


class Tokens(PreTrainedTokenizerFast):
    pass
"""
_MODELS = ("AutoModel", "AutoBackbone", "AutoModelForObjectDetection")
_AUTO_MAP = {
    "AutoConfig": "code.Config",
    "AutoTokenizer": [None, "code.Tokens"],
    "AutoImageProcessor": "code.Tokens",
    **dict.fromkeys(_MODELS, "code.Model"),
}


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the code writes if it runs; somebody agrees to everything."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "ran"


def with_code(folder: Path, marker: Path, model_type: str | None) -> Path:
    """A folder of a language model whose every file refers to code; of no known type where none is given."""
    write_text_model(folder)
    (folder / "code.py").write_text(_CODE.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = _AUTO_MAP
    config.pop("model_type")
    config |= {"model_type": model_type} if model_type else {}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        values = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        values |= {"auto_map": _AUTO_MAP, "tokenizer_class": "Tokens", "image_processor_type": "Processor"}
        (folder / name).write_text(json.dumps(values))
    return folder


def _language_model(folder: Path) -> None:
    LanguageModel(LanguageModelSource.find(str(folder), None, "mean"))


def _backbone(folder: Path) -> None:
    build_backbone(BackboneConfig(name=str(folder)))


def _bare_backbone(folder: Path) -> None:
    build_backbone(BackboneConfig(name=str(folder), pretrained=False))


def _detector(folder: Path) -> None:
    from_detector(folder, ["cup"])


ENTRIES = [_language_model, _backbone, _bare_backbone, _detector, read_published]


@pytest.mark.parametrize("model_type", [None, "stranger", "bert", "resnet", "detr", "deformable_detr", "rt_detr"])
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.__name__.strip("_"))
def test_code_of_a_folder_never_runs(
    entry: Callable[[Path], object], model_type: str | None, marker: Path, tmp_path: Path
) -> None:
    folder = with_code(tmp_path / "model", marker, model_type)
    said = ""
    try:
        entry(folder)
    except MetrError as error:
        said = str(error)
    assert "trust_remote_code=True" not in said
    assert "code" in said or model_type not in {None, "stranger"}
    assert not marker.exists()


@pytest.mark.parametrize("model_type", [None, "stranger", "bert"])
@pytest.mark.parametrize("key", ["backbone", "text"])
def test_code_that_a_checkpoint_names_never_runs(
    key: str, model_type: str | None, marker: Path, tmp_path: Path, tiny_run: TinyRun, metr: CommandLine
) -> None:
    folder = with_code(tmp_path / "model", marker, model_type)
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_run.best, checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    if key == "backbone":
        config["model"]["backbone"] |= {"name": str(folder), "options": {}, "pretrained": True}
    else:
        config["text_encoder"]["source"] = str(folder)
        config["text_encoder"].pop("identity", None)
    (checkpoint / "config.json").write_text(json.dumps(config))
    image = next(tiny_run.unseen[0].parent.glob("*.*"))
    calls = [
        ["detect", checkpoint, image, "--categories", "a name never seen", "-o", tmp_path / "found"],
        ["evaluate", checkpoint, tiny_run.data[0]],
        ["finetune", tiny_run.data[0], "--from", checkpoint, "-o", tmp_path / "tuned", "--steps", "1"],
        ["transfer", checkpoint, "--to", "deformable_detr", "--names", "zebra, lion", "-o", tmp_path / "moved"],
    ]
    for call in calls:
        ended = metr(*call)
        assert "Traceback" not in ended.err
        assert "custom code?" not in ended.words
        if key == "backbone":
            assert ended.code == 1, ended.err
        assert not marker.exists(), call


def test_code_that_a_command_names_never_runs(
    marker: Path, tmp_path: Path, tiny_run: TinyRun, metr: CommandLine
) -> None:
    folder = with_code(tmp_path / "model", marker, None)
    data = tiny_run.data[0]
    settings = [f"text.source={folder}", f"model.backbone.name={folder}"]
    calls = [["train", data, "-o", tmp_path / "run", "--set", setting] for setting in settings]
    calls += [
        ["inspect", data, tiny_run.data[1], "--text", folder],
        ["transfer", "--from", folder, "-o", tmp_path / "taken", "--names", "cup"],
        ["finetune", data, "--from", folder, "-o", tmp_path / "tuned"],
    ]
    for call in calls:
        ended = metr(*call)
        assert ended.code in {1, 2}, ended.out
        assert not marker.exists(), call


def test_an_attention_from_elsewhere_is_refused(marker: Path, tmp_path: Path) -> None:
    write_text_model(tmp_path / "text")
    path = tmp_path / "text" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attn_implementation": "stranger/kernel"}))
    with pytest.raises(ModelError, match=r"stranger/kernel.*code"):
        LanguageModelSource.find(str(tmp_path / "text"), None, "mean")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_a_text_folder_holds_safetensors(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "text"
    write_text_model(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(1)}, folder / name)
    with pytest.raises(ModelError, match=rf"{name}.*\n.*safetensors"):
        LanguageModel(LanguageModelSource.find(str(folder), None, "mean"))


def test_every_call_of_transformers_goes_through_one_place() -> None:
    """A new call that forgets to refuse code would be found here."""
    source = Path(package.__file__).parent
    found = {
        path.relative_to(source).as_posix(): line.strip()
        for path in sorted(source.rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"(?<!METR)(?<!`)\.(from_pretrained|from_config)\(", line)
    }
    found.pop("conversion/trainer.py")  # an example for people to copy
    assert set(found) == {"hub.py"}
