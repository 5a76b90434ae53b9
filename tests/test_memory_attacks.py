"""Configurations, images and checkpoints that would take gigabytes are refused before memory is taken."""

import json
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metr.conversion.published import read_restricted
from metr.errors import CheckpointError, ConfigError, ModelError
from metr.model import METR
from metr.models.config import DetectorConfig
from metr.models.detector import MOST_PARAMETERS, Detector, skeleton
from metr.text.language_model import LanguageModelSource
from metr.training.config import load_recipe

from small import TEXT_WIDTH, small_config
from tiny import TinyRun, tiny_run, write_text_model

__all__ = ["tiny_run"]

ABSURD = [
    {"encoder": {"feed_forward": 20_000_000}},
    {"encoder": {"layers": 100_000}},
    {"decoder": {"layers": 100_000}},
    {"categories": {"blocks": 10**9}},
    {"queries": {"number": 10**9}},
    {"queries": {"ceiling": 10**9}},
    {"denoising": {"number": 10**9}},
    {"encoder": {"levels": 10**6}},
    {"encoder": {"points": 10**6}},
    {"encoder": {"fusion_expansion": 1e9}},
    {"width": 8 * 10**6},
]


@pytest.mark.parametrize("tree", ABSURD, ids=str)
def test_absurd_configurations_are_refused(tree: dict, tmp_path: Path, tiny_run: TinyRun) -> None:
    with pytest.raises(ConfigError, match="less than or equal to"):
        DetectorConfig.checked(tree)
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_run.best, checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    for section, values in tree.items():
        config["model"][section] = config["model"][section] | values if isinstance(values, dict) else values
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        METR.from_pretrained(checkpoint, device="cpu")


@pytest.mark.parametrize(
    "setting",
    [
        "loader.batch_size=1000000",
        "loader.prefetch=1000000",
        "augmentation.resize.size=1000000",
        "loader.workers=99999",
    ],
)
def test_absurd_recipes_are_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match="less than or equal to"):
        load_recipe("nano", None, [setting])


def test_a_network_that_the_weights_do_not_fit_is_not_built(
    tmp_path: Path, tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_run.best, checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    config["model"]["decoder"] |= {"feed_forward": 65_536, "layers": 100}
    (checkpoint / "config.json").write_text(json.dumps(config))
    made: list[object] = []
    whole = Detector.__init__

    def noted(self: Detector, *arguments: object) -> None:
        whole(self, *arguments)
        made.extend(parameter for parameter in self.parameters() if parameter.device.type != "meta")

    monkeypatch.setattr(Detector, "__init__", noted)
    with pytest.raises(CheckpointError, match="do not fit the network"):
        METR.from_pretrained(checkpoint, device="cpu")
    assert not made


def test_the_skeleton_has_the_shapes_of_the_network() -> None:
    config = small_config()
    real, bare = (make(config, TEXT_WIDTH).state_dict() for make in (Detector, skeleton))
    assert {key: value.shape for key, value in real.items()} == {key: value.shape for key, value in bare.items()}
    huge = DetectorConfig.checked({"width": 8192, "encoder": {"layers": 100, "feed_forward": 65_536}})
    with pytest.raises(ModelError, match=f"METR builds at most {MOST_PARAMETERS:,}"):
        skeleton(huge, TEXT_WIDTH)


@pytest.mark.parametrize("values", [{"num_hidden_layers": 10**8}, {"hidden_size": 10**9}, {"vocab_size": 10**12}])
def test_absurd_models_of_transformers_are_refused(values: dict, tmp_path: Path) -> None:
    write_text_model(tmp_path / "text")
    path = tmp_path / "text" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(ModelError, match=next(iter(values))):
        LanguageModelSource.find(str(tmp_path / "text"), None, "mean")


def deflated(path: Path, megabytes: int) -> Path:
    """A checkpoint of PyTorch whose zeros are compressed a thousandfold."""
    torch.save({"model": {"weight": torch.zeros(megabytes << 18)}}, path)
    packed = path.with_suffix(".packed.pth")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for part in source.infolist():
            target.writestr(part.filename, source.read(part))
    path.unlink()
    return packed


def test_a_compressed_checkpoint_is_refused(tmp_path: Path) -> None:
    packed = deflated(tmp_path / "dino.pth", 64)
    assert packed.stat().st_size < 1 << 20
    with pytest.raises(CheckpointError, match="would unfold to 67,"):
        read_restricted(packed)
    torch.save({"model": {"weight": torch.zeros(8)}}, tmp_path / "plain.pth")
    assert read_restricted(tmp_path / "plain.pth").state["weight"].shape == (8,)


_DECODE = """
import resource, sys
from pathlib import Path
from metr.data.images import read_image
from metr.errors import DataError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_image(Path(sys.argv[1]))
except DataError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def png(path: Path, width: int, height: int, colour_type: int, depth: int = 8) -> Path:
    """A PNG of zeros, of a kind (0 grey, 2 RGB, 4 grey and alpha, 6 RGBA), written without holding it in memory."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
    packer = zlib.compressobj(9)
    row = bytes(1 + width * channels * depth // 8)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([depth, colour_type, 0, 0, 0])
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("colour_type", "depth"), [(6, 8), (4, 8), (0, 16), (6, 16), (2, 8)])
def test_the_largest_images_take_less_than_two_gigabytes(colour_type: int, depth: int, tmp_path: Path) -> None:
    path = png(tmp_path / "large.png", 11_500, 11_600, colour_type, depth)
    assert path.stat().st_size < 2 << 20
    ran = subprocess.run([sys.executable, "-c", _DECODE, path], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 2000


def test_larger_images_are_refused_by_their_header(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    png(path, 64, 64, 6)
    data = bytearray(path.read_bytes())
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)
    ran = subprocess.run([sys.executable, "-c", _DECODE, path], capture_output=True, text=True, check=True)
    assert "than the limit of" in ran.stdout
    assert int(ran.stdout.splitlines()[-1]) < 100


def test_strips_are_converted_as_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from metr.data import images, pixels

    chance = np.random.default_rng(0)
    made = [
        Image.fromarray(chance.integers(0, 256, (37, 23, 4), dtype=np.uint8), "RGBA"),
        Image.fromarray(chance.integers(0, 256, (37, 23, 2), dtype=np.uint8), "LA"),
        Image.fromarray(chance.integers(0, 1 << 16, (37, 23)).astype(np.int32)),
        Image.fromarray(chance.normal(100, 200, (37, 23)).astype(np.float32)),
        Image.fromarray(chance.uniform(0, 1, (37, 23)).astype(np.float32)),
        Image.fromarray(chance.integers(0, 256, (37, 23, 3), dtype=np.uint8)).quantize(16),
    ]
    made[-1].info["transparency"] = 3
    whole = [images.rgb_pixels(image, "made") for image in made]
    monkeypatch.setattr(pixels, "_STRIP", 100)
    for image, expected in zip(made, whole, strict=True):
        np.testing.assert_array_equal(images.rgb_pixels(image, "made"), expected)
