"""Other detectors become METR: folders of transformers, and pickled files of which nothing runs."""

import json
import os
import pickle
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_cases import (
    NAMES,
    SIDE,
    alike,
    dino_like,
    maps_of,
    normalised,
    random_images,
    save_folder,
    stir,
    stirred,
)
from rich.console import Console
from torch import Tensor
from transformers import AutoConfig, AutoModelForObjectDetection, ResNetConfig

from metr.checkpoint import load_checkpoint
from metr.conversion.adoption import from_detector, import_detector
from metr.conversion.export import build, colours_of
from metr.conversion.import_ import read_published
from metr.conversion.published import read_restricted
from metr.conversion.targets import find_target
from metr.conversion.transfer import REPORT, to_detector, transfer
from metr.data.config import ResizeConfig
from metr.errors import CheckpointError, ConfigError, ModelError
from metr.model import METR
from metr.text.encoder import TextEncoderConfig
from metr.training.config import load_recipe
from metr.training.finetune_recipe import defaults_for, finetune_recipe

from tiny import write_text_model

FOLDERS = ("deformable_detr", "rt_detr", "rt_detr_v2", "d_fine", "deimv2")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextEncoderConfig:
    folder = tmp_path_factory.mktemp("text")
    write_text_model(folder)
    return TextEncoderConfig(source=str(folder), templates=("{}",))


def written(name: str, folder: Path) -> Any:
    """A detector of transformers with weights of its own, in a folder."""
    target, network = find_target(name), stirred(alike(name))
    model = stir(build(target, network, NAMES, seed=3)).eval()
    save_folder(model, name, network, folder)
    return model


@pytest.mark.parametrize("name", FOLDERS)
@torch.no_grad()
def test_folders_of_transformers(name: str, tmp_path: Path, text: TextEncoderConfig) -> None:
    model = written(name, tmp_path)
    ours, report = import_detector(tmp_path, text=text, device="cpu")
    assert ours.names == NAMES
    assert ours.resize.size == SIDE
    images = random_images()
    theirs = model(normalised(ours.network, images)).encoder_last_hidden_state
    if not isinstance(theirs, Tensor):
        levels = [project(level) for project, level in zip(model.model.decoder_input_proj, theirs, strict=True)]
        theirs = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
    padding = torch.zeros(2, *images.shape[2:], dtype=torch.bool)
    memory = ours.network.encoder(ours.network.backbone(images), padding).tokens
    torch.testing.assert_close(memory, theirs, atol=1e-4, rtol=1e-4)
    fresh = ("category_extraction", "class_queries", "denoising", "decoder.similarity", "decoder.norm")
    more = ("decoder.position",) if name == "deformable_detr" else ()
    for key in report.afresh:
        assert key.startswith((*fresh, *more, "proposals.category", "proposals.bias")), key


def test_it_is_saved_loaded_and_detects(tmp_path: Path, text: TextEncoderConfig) -> None:
    written("rt_detr", tmp_path / "theirs")
    made = from_detector(tmp_path / "theirs", ["bear", "otter"], text=text, device="cpu")
    made.save_pretrained(tmp_path / "ours")
    again = METR.from_pretrained(tmp_path / "ours", device="cpu")
    image = (torch.rand(50, 70, 3) * 255).byte().numpy()
    first, second = (model.detect(image, threshold=0.0) for model in (made, again))
    assert first.names == ("bear", "otter")
    assert torch.equal(first.boxes, second.boxes)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_fine_tuning_begins_with_the_rates_of_base(kind: str, tmp_path: Path, text: TextEncoderConfig) -> None:
    """As high as nano's own they would undo what another detector has learnt."""
    source = tmp_path / "theirs.pth"
    if kind == "folder":
        written("rt_detr", source)
    else:
        torch.save({"model": dino_like(authors=False)[1], "args": Namespace(nheads=4)}, source)
    made, _ = import_detector(source, ["bear", "otter"], text=text, device="cpu")
    made.save_pretrained(tmp_path / "ours")
    checkpoint = load_checkpoint(tmp_path / "ours")
    base, recipe = load_recipe("base"), finetune_recipe(checkpoint, images=2000)
    assert recipe.loader.batch_size == base.loader.batch_size
    own, wanted = recipe.train.optimizer, base.train.optimizer
    assert own.backbone_multiplier == wanted.backbone_multiplier == 0.1
    assert own.clip_norm == wanted.clip_norm == 0.1
    assert own.learning_rate == defaults_for(2000).rate * wanted.learning_rate
    # what the detector's files do not say is METR's own
    assert recipe.criterion == finetune_recipe(replace(checkpoint, training={}), images=2000).criterion
    assert recipe.augmentation.sizes == ()
    assert recipe.augmentation.resize == made.resize


@pytest.mark.parametrize(
    ("resize", "note"),
    [
        (ResizeConfig(mode="fit", size=96, longest=160), "stretched to squares of 96 pixels; this METR's keep"),
        (ResizeConfig(mode="stretch", size=80), "images have 96 pixels, a multiple of 32; this METR's have 80"),
        (ResizeConfig(mode="stretch", size=96), None),
    ],
)
def test_images_of_another_shape_are_told_of(
    resize: ResizeConfig, note: str | None, tmp_path: Path, text: TextEncoderConfig
) -> None:
    written("rt_detr", tmp_path / "theirs")
    made, _ = import_detector(tmp_path / "theirs", text=text, device="cpu")
    model = METR(made.network, replace(made.checkpoint, preprocessing=resize.model_dump(mode="json")))
    model.save_pretrained(tmp_path / "ours")
    report = transfer(tmp_path / "ours", "rt_detr", tmp_path / "out", names=None, console=Console(quiet=True))
    told = [one for one in report.notes if "pixels" in one]
    assert len(told) == (note is not None)
    assert note is None or note in told[0]
    assert json.loads((tmp_path / "out" / REPORT).read_text())["notes"] == list(report.notes)
    size = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["size"]
    assert size == {"height": 96, "width": 96}
    fitting = [one for one in to_detector(model, "deformable_detr").report.notes if "squares" in one]
    assert fitting == []


def test_the_colours_of_a_detector_that_does_not_normalise(tmp_path: Path, text: TextEncoderConfig) -> None:
    written("rt_detr", tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(file.read_text().replace('"do_normalize": true', '"do_normalize": false'))
    ours, _ = import_detector(tmp_path, text=text, device="cpu")
    assert colours_of(ours.network) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("width", "told"), [(64, ("its group norms have 32 groups, METR's have fewer at a width of 64",)), (128, ())]
)
def test_narrow_group_norms_are_told(width: int, told: tuple[str, ...], tmp_path: Path) -> None:
    network = stirred(alike("deformable_detr"))
    target = find_target("deformable_detr")
    model = build(target, network, NAMES, seed=3)
    values = model.config.to_dict() | {"d_model": width, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    narrow = type(model)(type(model.config).from_dict(values))
    save_folder(narrow, "deformable_detr", network, tmp_path)
    assert read_published(tmp_path).differences == told


@pytest.mark.parametrize(
    ("name", "stages", "strides"),
    [
        ("detr", ["stage3"], (16,)),
        ("detr", ["stage4"], (32,)),
        ("deformable_detr", ["stage2", "stage3"], (8, 16)),
        ("deformable_detr", ["stage1", "stage2", "stage3", "stage4"], (4, 8, 16, 32)),
    ],
)
def test_strides_are_those_of_the_maps_that_are_read(
    name: str, stages: list[str], strides: tuple[int, ...], tmp_path: Path, text: TextEncoderConfig
) -> None:
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12, 16, 20], depths=[1] * 4, layer_type="basic", out_features=stages
    )
    sizes = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "d_model": 128, "num_queries": 10, "auxiliary_loss": False}
    config = AutoConfig.for_model(name, backbone_config=backbone, **sizes, **layers, id2label=dict(enumerate(NAMES)))
    network: Any = AutoModelForObjectDetection
    model = stir(network.from_config(config)).eval()
    save_folder(model, name, stirred(alike("deformable_detr")), tmp_path)
    made, report = import_detector(tmp_path, text=text, device="cpu")
    assert made.network.backbone.strides == strides
    assert report.differences == ()
    pixels = normalised(made.network, random_images(2))
    with torch.no_grad():
        theirs = maps_of(model, pixels, torch.ones(2, *pixels.shape[2:], dtype=torch.long))
        ours = made.network.backbone(random_images(2))
    assert len(ours) == len(strides)
    for one, other in zip(theirs, ours, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_calibration_that_stays_behind_is_told(tmp_path: Path, text: TextEncoderConfig) -> None:
    written("rt_detr", tmp_path / "theirs")
    made, _ = import_detector(tmp_path / "theirs", text=text, device="cpu")
    assert to_detector(made, "rt_detr").report.differences == ()
    detection = made.checkpoint.detection.calibrated({NAMES[0]: (2.0, -1.0), NAMES[1]: (0.5, 0.0)})
    model = METR(made.network, replace(made.checkpoint, detection=detection))
    (told,) = to_detector(model, "rt_detr").report.differences
    assert "the calibration of 2 names stays with METR" in told
    assert to_detector(model, "rt_detr", [NAMES[2]]).report.differences == ()


def test_a_folder_without_names_or_preprocessing(tmp_path: Path, text: TextEncoderConfig) -> None:
    model = written("rt_detr", tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    model.config.id2label = {0: "LABEL_0", 1: "N/A", 2: "LABEL_2"}
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="does not say what it finds"):
        import_detector(tmp_path, text=text, device="cpu")
    with pytest.raises(ConfigError, match="expected 3 names"):
        import_detector(tmp_path, ["fish"], text=text, device="cpu")
    ours, _ = import_detector(tmp_path, ["fish", "N/A", "ray"], text=text, device="cpu")
    assert ours.names == ("fish", "ray")


def test_a_detector_that_metr_does_not_know(tmp_path: Path, text: TextEncoderConfig) -> None:
    from transformers import YolosConfig

    YolosConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no weights from a yolos"):
        import_detector(tmp_path, text=text, device="cpu")


def test_options_without_a_counterpart(tmp_path: Path, text: TextEncoderConfig) -> None:
    model = written("rt_detr", tmp_path)
    model.config.normalize_before = True
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="needs normalize_before = False"):
        import_detector(tmp_path, text=text, device="cpu")


@pytest.mark.parametrize("authors", [False, True], ids=["dino", "authors"])
@torch.no_grad()
def test_files_of_dino_and_of_the_authors(authors: bool, tmp_path: Path, text: TextEncoderConfig) -> None:
    network, state = dino_like(authors)
    torch.save({"model": state, "args": Namespace(nheads=4, lr=1e-4), "epoch": 3}, tmp_path / "theirs.pth")
    ours, report = import_detector(tmp_path / "theirs.pth", ["a", "b"], text=text, device="cpu")
    assert ours.network.config.decoder.points == 3
    images = random_images()
    padding = torch.zeros(2, *images.shape[2:], dtype=torch.bool)
    padding[1, :, 50:] = True
    memories = [one.encoder(one.backbone(images), padding).tokens for one in (network, ours.network)]
    torch.testing.assert_close(memories[0], memories[1], atol=1e-5, rtol=1e-5)
    for key in ("decoder.layers.1.among.key.weight", "decoder.position.0.weight", "proposals.box.change.4.bias"):
        assert torch.equal(network.state_dict()[key], ours.network.state_dict()[key])
    assert not [key for key in report.afresh if key.startswith(("class_queries", "proposals"))]
    if authors:
        assert ours.network.config.queries.layout == "shared"
        assert report.start
    else:
        assert ours.network.config.queries.layout == "places"
        assert report.start == "", "it is a detector already"


def test_the_authors_text_embeddings(tmp_path: Path, text: TextEncoderConfig) -> None:
    """Where the text encoder's width is theirs and the names are as many, the file's embeddings hold."""
    _, state = dino_like(authors=True)
    state["transformer.prompt_indicator.class_prompts"] = torch.randn(2, 16)
    torch.save({"model": state, "args": Namespace(nheads=4)}, tmp_path / "theirs.pth")
    ours, _ = import_detector(tmp_path / "theirs.pth", ["a", "b"], text=text, device="cpu")
    prompts = state["transformer.prompt_indicator.class_prompts"]
    assert torch.equal(ours.checkpoint.text_embeddings, prompts)
    other, _ = import_detector(tmp_path / "theirs.pth", ["a", "b", "c"], text=text, device="cpu")
    assert other.checkpoint.text_embeddings.shape == (3, 16)


class Malice:
    """Runs a command where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, Sequence[Any]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "bare pickle"])
def test_nothing_in_a_file_runs(legacy: bool, tmp_path: Path, text: TextEncoderConfig) -> None:
    file, trace = tmp_path / "evil.pth", tmp_path / "ran"
    harm = {"model": {"weight": torch.zeros(1)}, "args": Malice(trace)}
    if legacy:
        file.write_bytes(pickle.dumps(harm))
    else:
        torch.save(harm, file)
    with pytest.raises(CheckpointError, match=r"would (run|have to run) code") as error:
        import_detector(file, ["a"], text=text, device="cpu")
    assert not trace.exists()
    assert "weights_only" not in str(error.value)
    assert legacy or "mkdir" in str(error.value)


def test_files_that_are_no_checkpoints(tmp_path: Path, text: TextEncoderConfig) -> None:
    file = tmp_path / "theirs.pth"
    with pytest.raises(CheckpointError, match="no such file"):
        read_restricted(file)
    for content in (b"", b"no pickle at all", b"PK\x03\x04 cut off"):
        file.write_bytes(content)
        with pytest.raises(CheckpointError):
            read_restricted(file)
    for value, message in (([1, 2], "expected a mapping"), ({"epoch": 3}, "holds no state")):
        torch.save(value, file)
        with pytest.raises(CheckpointError, match=message):
            read_restricted(file)
    torch.save({"model": {"stem.weight": torch.zeros(2)}}, file)
    with pytest.raises(ModelError, match="expected the weights of DINO"):
        import_detector(file, ["a"], text=text, device="cpu")
    _, state = dino_like(authors=False)
    torch.save({key: tensor for key, tensor in state.items() if "layer4" not in key}, file)
    with pytest.raises(ModelError, match="other than a ResNet"):
        import_detector(file, ["a"], text=text, device="cpu")
    torch.save({key: tensor for key, tensor in state.items() if ".encoder.layers.0." not in key}, file)
    with pytest.raises(ModelError, match=r"not whole: transformer\.encoder\.layers\.0"):
        import_detector(file, ["a"], text=text, device="cpu")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_of_a_file_that_are_not_finite(value: float, tmp_path: Path, text: TextEncoderConfig) -> None:
    _, state = dino_like(authors=False)
    key = next(key for key in state if "encoder.layers.0" in key)
    torch.save(state | {key: torch.full_like(state[key], value)}, tmp_path / "theirs.pth")
    with pytest.raises(CheckpointError, match=f"{key} holds numbers that are not finite"):
        import_detector(tmp_path / "theirs.pth", ["a"], text=text, device="cpu")


@pytest.mark.parametrize("args", [["--nheads", "4"], "nheads=4", 7, None])
def test_options_of_another_kind_are_none(args: object, tmp_path: Path) -> None:
    file = tmp_path / "theirs.pth"
    torch.save({"model": {"stem.weight": torch.zeros(2)}, "args": args}, file)
    assert read_restricted(file).options == {}
