"""Folders whose detector carries timm's ResNet, as published ones do: adopted without timm, or refused plainly."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_cases import NAMES, alike, save_folder, stir, stirred, texts
from safetensors.torch import load_file, save_file
from timm_cases import reconfigured, rewritten, timm_state

from metr.conversion.export import build
from metr.conversion.import_ import adopt, read_published
from metr.conversion.targets import find_target
from metr.errors import CheckpointError, ModelError
from metr.models.backbones.base import BackboneConfig
from metr.models.config import DetectorConfig
from metr.models.detector import Detector
from metr.sources import find_source

OLD = {
    "backbone": "resnet50",
    "backbone_config": None,
    "backbone_kwargs": {"in_chans": 3, "out_indices": [2, 3, 4]},
    "use_timm_backbone": True,
    "use_pretrained_backbone": True,
    "dilation": False,
}
SHORT = {"backbone": "resnet101", "use_timm_backbone": True}
NEW = {
    "backbone_config": {
        "model_type": "timm_backbone",
        "backbone": "resnet34.a1_in1k",
        "out_indices": [2, 3, 4],
        "features_only": True,
        "num_channels": 3,
    }
}


def with_resnet(name: str, kind: str) -> DetectorConfig:
    options = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 2, 1, 1], "layer_type": kind}
    backbone = BackboneConfig(name="resnet", pretrained=False, freeze_stages=0, options=options)
    return alike(name).model_copy(update={"backbone": backbone})


def written(name: str, kind: str, folder: Path) -> None:
    network = stirred(with_resnet(name, kind))
    model: Any = stir(build(find_target(name), network, NAMES, seed=3)).eval()
    save_folder(model, name, network, folder)


def adopted(folder: Path) -> Detector:
    return adopt(read_published(folder), texts())[0]


def same(first: Detector, second: Detector) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    assert first.config == second.config
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    ("name", "kind", "changes", "wrapped"),
    [
        ("deformable_detr", "bottleneck", OLD, False),
        ("deformable_detr", "basic", SHORT, False),
        ("deformable_detr", "bottleneck", {}, False),
        ("deformable_detr", "basic", NEW, False),
        ("rt_detr", "bottleneck", NEW, True),
        ("rt_detr", "basic", SHORT, True),
    ],
    ids=["published", "by name", "by default", "by configuration", "wrapped", "wrapped, by name"],
)
def test_timms_resnet_is_transformers(
    name: str, kind: str, changes: dict[str, Any], wrapped: bool, tmp_path: Path
) -> None:
    written(name, kind, tmp_path)
    original = adopted(tmp_path)
    rewritten(tmp_path, changes, wrapped)
    names = load_file(tmp_path / "model.safetensors")
    assert any(key.endswith("model.layer2.1.conv1.weight") or "_backbone.layer2.1.conv1" in key for key in names)
    assert not any("embedder" in key for key in names)
    found = adopted(tmp_path)
    assert found.backbone.strides == (8, 16, 32)
    assert same(original, found)


def test_weights_in_several_files_or_pickled(tmp_path: Path) -> None:
    written("deformable_detr", "basic", tmp_path)
    original, state = adopted(tmp_path), timm_state(tmp_path)
    reconfigured(tmp_path, OLD)
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert same(original, adopted(tmp_path))
    (tmp_path / "pytorch_model.bin").unlink()
    where = {key: f"part-{number % 2}.safetensors" for number, key in enumerate(state)}
    for part in set(where.values()):
        save_file({key: tensor for key, tensor in state.items() if where[key] == part}, tmp_path / part)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert same(original, adopted(tmp_path))
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_published(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "resnet50d", "use_timm_backbone": True}, r"carries timm's resnet50d; of timm's networks METR"),
        ({"backbone": "mobilenetv3_small_100"}, r"carries timm's mobilenetv3_small_100"),
        (OLD | {"dilation": True, "backbone_kwargs": {}}, r"carries timm's resnet50 with maps of stride 16"),
        ({"backbone_config": NEW["backbone_config"] | {"out_indices": [0, 3]}}, r"with a map of its stem"),
    ],
)
def test_other_networks_of_timm_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    written("deformable_detr", "basic", tmp_path)
    rewritten(tmp_path, changes)
    with pytest.raises(ModelError, match=message) as error:
        read_published(tmp_path)
    assert "timm's resnet50" in str(error.value.hint)
    assert "use_timm_backbone=False" in str(error.value.hint)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("dab-detr", {"backbone": "resnet50", "backbone_config": None, "dilation": True}),
        ("dab_detr", {"backbone_config": NEW["backbone_config"] | {"output_stride": 16}}),
        ("conditional_detr", {"backbone": "resnet50", "dilation": True}),
        ("detr", {"backbone": "resnet101", "use_timm_backbone": True, "dilation": True}),
        ("detr", {"dilation": True}),
    ],
)
def test_dilated_backbones_are_refused_before_weights_are_read(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name, **changes}))
    with pytest.raises(ModelError, match=r"with maps of stride 16, by dilation \(a variant dc5\); of timm's") as error:
        read_published(find_source(tmp_path))
    assert "timm's resnet50" in str(error.value.hint)


def test_weights_that_are_not_a_resnets(tmp_path: Path) -> None:
    written("deformable_detr", "basic", tmp_path)
    rewritten(tmp_path, OLD)
    state = load_file(tmp_path / "model.safetensors")
    first = next(key for key in state if key.endswith(".conv1.weight") and "layer" not in key)
    odd = first.replace("conv1.weight", "layer1.0.se.fc1.weight")
    save_file(state | {odd: torch.zeros(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"but it has .*layer1\.0\.se\.fc1\.weight"):
        read_published(tmp_path)
    rest = {key: tensor for key, tensor in state.items() if ".bn1.running_mean" not in key}
    save_file(rest, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"the backbone is not whole: .*running_mean is missing"):
        read_published(tmp_path)
    rest = {key: tensor for key, tensor in state.items() if ".backbone." not in key}
    save_file(rest, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="its weights are not those of one"):
        read_published(tmp_path)
