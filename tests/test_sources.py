"""Where detectors are found: folders, files and names on the hub; and what is said of those that are none."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, file_download

import metr
from conversion.conversion_cases import NAMES, alike, save_folder, stir, stirred
from hub_stand_in import TOKEN, Hub, Repository, hub, point_to
from metr.conversion.export import build
from metr.conversion.targets import find_target
from metr.errors import CheckpointError, ConfigError, MetrError, ModelError
from metr.model import METR
from metr.sources import find_source

from tiny import TinyRun, tiny_run

__all__ = ["hub", "tiny_run"]

NAME = "lab/detector"
NEEDED = {"config.json", "preprocessor_config.json", "model.safetensors"}


@pytest.fixture(autouse=True)
def _own_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the user's cache or token, and no path here that looks like a name on the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(file_download.time, "sleep", lambda _: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An RT-DETR of random weights, as transformers saves it."""
    place = tmp_path_factory.mktemp("theirs") / "rt-detr"
    network = stirred(alike("rt_detr"))
    model = stir(build(find_target("rt_detr"), network, NAMES, seed=3)).eval()
    save_folder(model, "rt_detr", network, place)
    return place


def files_of(folder: Path, **changes: bytes | None) -> dict[str, bytes]:
    """The files of a folder; those of `changes` (with an underscore for a dot) are others, or missing."""
    files: dict[str, bytes | None] = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    files |= {name.replace("__", "."): content for name, content in changes.items()}
    return {name: content for name, content in files.items() if content is not None}


def shared(hub: Hub, files: dict[str, bytes], **how: bool) -> Repository:
    hub.repositories[NAME] = Repository(**how)
    hub.repositories[NAME].commit(files)
    return hub.repositories[NAME]


def config_with(folder: Path, **values: object) -> bytes:
    config = json.loads((folder / "config.json").read_text())
    return json.dumps({key: value for key, value in (config | values).items() if value is not None}).encode()


def same_weights(first: METR, second: METR) -> bool:
    ours, theirs = first.network.state_dict(), second.network.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_what_lies_here_is_told_apart(folder: Path, tiny_run: TinyRun, tmp_path: Path) -> None:
    (tmp_path / "dino.pth").write_bytes(b"PK")
    for path, kind in (
        (tiny_run.folder, "metr"),
        (tiny_run.best, "metr"),
        (folder, "transformers"),
        (tmp_path / "dino.pth", "file"),
    ):
        found = find_source(path)
        assert (found.kind, found.repository, found.pinned) == (kind, None, str(path))
    assert find_source(str(folder)).public_name == "rt-detr"


def test_one_way_in_for_every_kind(folder: Path, hub: Hub, tiny_run: TinyRun) -> None:
    here = metr.from_detector(folder, device="cpu")
    assert here.names == NAMES
    assert same_weights(METR.from_pretrained(folder, device="cpu"), here)
    extra = {"pytorch_model.bin": b"a pickle", "onnx/model.onnx": b"large", "model.fp16.safetensors": b"large"}
    shared(hub, files_of(folder) | extra)
    there = METR.from_pretrained(NAME, device="cpu")
    assert same_weights(there, here)
    assert set(hub.got()) == NEEDED, "only what is needed"
    assert there.checkpoint.training["started from"] == f"RT-DETR ({NAME})"
    hub.asked.clear()
    assert same_weights(metr.from_detector(NAME, device="cpu"), here)
    assert hub.got() == [], "nothing twice"
    with pytest.raises(ModelError, match=r"(?s)run: is a METR already.*from_pretrained"):
        metr.from_detector(tiny_run.folder)


def test_a_revision_stands_after_the_name(folder: Path, hub: Hub) -> None:
    repository = shared(hub, files_of(folder))
    first = repository.refs["v1"] = repository.refs["main"]
    repository.commit({"README.md": b"moved"})
    for revision in ("v1", first):
        found = find_source(f"{NAME}@{revision}")
        assert (found.kind, found.pinned) == ("transformers", f"{NAME}@{first}")
        assert (found.fetched() / "model.safetensors").is_file()
    with pytest.raises(CheckpointError, match=r"detector: no revision 'v2'"):
        find_source(f"{NAME}@v2")
    with pytest.raises(ConfigError, match="two revisions: v1 and main"):
        find_source(f"{NAME}@v1", revision="main")


def test_what_was_fetched_needs_no_hub(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    shared(hub, files_of(folder))
    find_source(NAME).fetched()
    hub.asked.clear()
    assert (find_source(NAME, local_files_only=True).fetched() / "model.safetensors").is_file()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert (find_source(NAME).fetched() / "model.safetensors").is_file()
    assert hub.asked == []
    with pytest.raises(
        CheckpointError, match=r"(?s)lab/other: not among what was .* no folder or file .* here.*offline"
    ):
        find_source("lab/other")


@pytest.mark.parametrize("given", ["nothing", "no/such/folder", "./lab/detector", "~/none", "https://hub.example/a/b"])
def test_neither_a_path_nor_a_name_on_the_hub(given: str, hub: Hub) -> None:
    with pytest.raises(
        CheckpointError, match=r"no such checkpoint, folder or file here, and no name on the hub either"
    ):
        METR.from_pretrained(given)
    assert hub.asked == []


def test_a_name_that_nobody_has(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="lab/nothing: neither a folder here nor a model on the hub"):
        METR.from_pretrained("lab/nothing")
    point_to("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(CheckpointError, match=r"(?s)the hub cannot be reached .*; there is no folder or file .* here"):
        METR.from_pretrained("lab/nothing")


def refused(folder: Path, place: Path) -> dict[str, tuple[dict[str, bytes], type[MetrError], str]]:
    """What a repository may hold that is no detector for METR: its files, the error, and what is said."""
    bare = files_of(folder, model__safetensors=None)
    huge = config_with(folder, d_model=2_000_000, encoder_hidden_dim=2_000_000)
    wide = config_with(folder, decoder_ffn_dim=9_000_000, encoder_ffn_dim=9_000_000)
    whole = (folder / "model.safetensors").read_bytes()
    return {
        "nothing": ({"README.md": b"# soon"}, CheckpointError, "no METR checkpoint and no detector .*no config.json"),
        "neither": (
            {"config.json": b'{"a": 1}'},
            CheckpointError,
            "no METR checkpoint and no .*config.json is of neither",
        ),
        "damaged": (bare | {"config.json": b"{"}, CheckpointError, "config.json: not readable as JSON"),
        "other": (
            bare | {"config.json": b'{"model_type": "yolos", "architectures": ["YolosForObjectDetection"]}'},
            ModelError,
            r"METR takes no weights from a yolos model \(YolosForObjectDetection\).*one of .*rt_detr, .*d_fine",
        ),
        "code": (
            bare | {"config.json": config_with(folder, auto_map={"AutoModel": "code.Model"}), "code.py": b"1 / 0"},
            ModelError,
            r"brings code of its own \(auto_map\), which METR never runs",
        ),
        "code inside": (
            bare | {"config.json": config_with(folder, backbone_config={"auto_map": {"AutoBackbone": "code.Model"}})},
            ModelError,
            r"brings code of its own \(auto_map\), which METR never runs",
        ),
        "anchors": (
            bare | {"config.json": config_with(folder, anchor_image_size=[60_000, 60_000])},
            ModelError,
            "anchor_image_size is 60000; METR builds no model with more than 16,384",
        ),
        "text": (
            bare | {"config.json": config_with(folder, d_model="64")},
            ModelError,
            "cannot load .*'d_model': .*expected int, got str .*mend that value in its config.json",
        ),
        "old layout": (
            bare | {"config.json": b'{"model_type": "deformable_detr", "num_feature_levels": "4"}'},
            ModelError,
            "cannot load this model: .*str",
        ),
        "labels": (
            files_of(folder, config__json=config_with(folder, id2label={"0": "fish"}, label2id={"fish": 0})),
            ModelError,
            r"class_embed.*: expected the shape \[1\] by its config.json, found \[\d+\] .*the labels in id2label",
        ),
        "no type": (bare | {"config.json": config_with(folder, model_type=None)}, ModelError, "names no model_type"),
        "huge": (
            bare | {"config.json": huge},
            ModelError,
            r"METR builds at most 2,000,000,000|describes .* parameters",
        ),
        "wide": (files_of(folder, config__json=wide), ModelError, r"describes [\d,]+ parameters, and its weights are"),
        "pickle": (
            bare | {"pytorch_model.bin": b"PK"},
            CheckpointError,
            "found only pytorch_model.bin, which could run",
        ),
        "no weights": (bare, CheckpointError, "expected model.safetensors, found no weights"),
        "cut": (
            files_of(folder, model__safetensors=whole[:-100]),
            CheckpointError,
            "model.safetensors: damaged, or cut",
        ),
        "no header": (
            files_of(folder, model__safetensors=b"\xff" * 99),
            CheckpointError,
            "not readable as safetensors",
        ),
    }


KINDS = (
    "nothing",
    "neither",
    "damaged",
    "other",
    "code",
    "code inside",
    "anchors",
    "text",
    "labels",
    "no type",
    "huge",
)
KINDS += ("wide", "pickle", "no weights", "cut", "no header")


@pytest.mark.parametrize("kind", KINDS)
def test_repositories_that_are_no_detector(kind: str, folder: Path, hub: Hub, tmp_path: Path) -> None:
    files, error, told = refused(folder, tmp_path)[kind]
    shared(hub, files)
    with pytest.raises(error, match=f"(?s){told}") as caught:
        METR.from_pretrained(NAME, device="cpu")
    assert "\n  try: " in str(caught.value)
    assert "Traceback" not in str(caught.value)
    fetched = {"model.safetensors"} if kind in {"labels", "wide", "cut", "no header"} else set()
    assert set(hub.got()) & {"model.safetensors", "pytorch_model.bin", "code.py"} == fetched
    # and the same of a folder, but for a config.json that says nothing
    if kind not in {"nothing", "neither"}:
        place = tmp_path / "here"
        place.mkdir()
        for name, content in files.items():
            (place / name).write_bytes(content)
        with pytest.raises(error, match=f"(?s){told}"):
            METR.from_pretrained(place, device="cpu")


def test_folders_without_weights_that_metr_reads(folder: Path, tmp_path: Path) -> None:
    for kept, told in (
        (None, "expected model.safetensors, found no weights"),
        ("flax_model.msgpack", "only flax_model"),
    ):
        place = Path(shutil.copytree(folder, tmp_path / str(kept)))
        (place / "model.safetensors").unlink()
        if kept is not None:
            (place / kept).touch()
        with pytest.raises(CheckpointError, match=told):
            METR.from_pretrained(place, device="cpu")
    place = Path(shutil.copytree(folder, tmp_path / "pickled"))
    torch.save({"weight": torch.zeros(1)}, place / "pytorch_model.bin")
    (place / "model.safetensors").unlink()
    with pytest.raises(MetrError, match=r"(?s)pytorch_model.bin.*safetensors"):
        METR.from_pretrained(place, device="cpu")
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers/dino.pth").touch()
    with pytest.raises(
        CheckpointError, match=r"(?s)expected a checkpoint .* or a folder of.*name the file itself: .*dino"
    ):
        METR.from_pretrained(tmp_path / "papers")
    with pytest.raises(CheckpointError, match=r"(?s)is one file of a folder.*name the folder: .*rt-detr"):
        METR.from_pretrained(folder / "model.safetensors")


def test_weights_that_are_not_whole(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    place = Path(shutil.copytree(folder, tmp_path / "part"))
    state = load_file(place / "model.safetensors")
    lost = next(key for key in state if "decoder.layers.1" in key)
    save_file({key: one for key, one in state.items() if key != lost}, place / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"the network is not whole: {lost} is missing"):
        METR.from_pretrained(place, device="cpu")


_HINT = "a value of its config.json or of another file there may be wrong"


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"encoder_attention_heads": 5}, r"counterpart of its config.json: width 32 is not divisible by 5 heads$"),
        ({"activation_function": "nope"}, rf"(?s)KeyError: 'nope'.*{_HINT}"),
        ({"backbone_config": {}}, rf"(?s)cannot load this model: \w+.*{_HINT}"),
        ({"id2label": ["a", "b"]}, rf"(?s)cannot load this model.*{_HINT}"),
        ({"decoder_attention_heads": 0}, rf"(?s)cannot load this model.*{_HINT}"),
        ({"d_model": "32"}, r"(?s)d_model.*mend that value in its config.json"),
    ],
)
def test_a_config_that_cannot_be_right(changed: dict[str, Any], told: str, folder: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(folder, tmp_path / "odd"))
    values = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(values | changed))
    with pytest.raises(MetrError, match=told) as caught:
        METR.from_pretrained(place, device="cpu")
    assert str(place) in str(caught.value)


def test_norms_that_were_frozen_have_counted_nothing(folder: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(folder, tmp_path / "freed"))
    values = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(values | {"freeze_backbone_batch_norms": False}))
    METR.from_pretrained(place, device="cpu")


def test_quantized_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    place = Path(shutil.copytree(folder, tmp_path / "quantized"))
    state = load_file(place / "model.safetensors")
    key = next(key for key, tensor in state.items() if tensor.ndim == 4)
    save_file(state | {key: state[key].to(torch.int8)}, place / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"(?s)1 of its tensors are quantized, such as {key} \(I8\).*float32"):
        METR.from_pretrained(place, device="cpu")


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"gated": True}, r"(?s)lab/detector: its owner grants access.*ask for access on its page"),
        ({"private": True}, r"(?s)lab/detector: neither a folder here nor a model .* may be seen.*hf auth login"),
    ],
)
def test_without_leave(how: dict[str, bool], told: str, folder: Path, hub: Hub) -> None:
    shared(hub, files_of(folder), **how)
    with pytest.raises(CheckpointError, match=told):
        METR.from_pretrained(NAME, token=False)
    assert find_source(NAME, token=TOKEN).kind == "transformers"


def test_faults_of_downloaded_files_tell_the_repository(folder: Path, hub: Hub, tmp_path: Path) -> None:
    shared(hub, files_of(folder, preprocessor_config__json=b"[1]"))
    with pytest.raises(CheckpointError, match=f"^{NAME}/preprocessor_config.json: expected") as caught:
        METR.from_pretrained(NAME)
    assert str(tmp_path) not in str(caught.value)


def test_a_download_that_breaks_off(folder: Path, hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shared(hub, files_of(folder))
    hub.breaks_after = 1000
    with (
        caplog.at_level(0),
        pytest.raises(CheckpointError, match=r"(?s)the download broke off.*same command") as caught,
    ):
        find_source(NAME).fetched()
    assert "no folder or file of this name here" not in str(caught.value)
    assert not [one for one in caplog.records if one.name.startswith("huggingface_hub") and one.levelname != "DEBUG"]
    left = [path for path in (tmp_path / "cache").rglob("*.safetensors") if path.exists()]
    assert left == [], "no half of a file stands where a whole one is looked for"
    with pytest.raises(CheckpointError, match="not among what was fetched before"):
        find_source(NAME, local_files_only=True).fetched()
    hub.breaks_after = None
    assert (find_source(NAME).fetched() / "model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()


def test_a_full_disk(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    shared(hub, files_of(folder))
    found = find_source(NAME)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file_download, "http_get", full)
    with pytest.raises(CheckpointError, match=r"(?s)lab/detector: the disk is full.*make room.*HF_HOME"):
        found.fetched()


def test_checkpoints_of_metr_come_whole(tiny_run: TinyRun, hub: Hub) -> None:
    shared(hub, files_of(tiny_run.best, vocabulary__json=None))
    with pytest.raises(CheckpointError, match=r"vocabulary\.json: no such file"):
        METR.from_pretrained(NAME)


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_no_detector(name: str) -> None:
    with pytest.raises(CheckpointError, match="found an empty name"):
        find_source(name)


def test_nothing_after_the_at_sign(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match=r"(?s)expected a branch, a tag or a commit after @.*write lab/detector"):
        find_source(f"{NAME}@")
