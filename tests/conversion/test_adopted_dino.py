"""A METR that adopts a file of DINO finds what DINO finds: compared with a forward pass in plain torch."""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from conversion_cases import dino_like, random_images
from torch import Tensor
from torch.nn.functional import layer_norm, linear, multi_head_attention_forward, relu
from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

from metr.conversion.adoption import from_detector, import_detector
from metr.conversion.asked_names import read_names
from metr.conversion.published.dino import COCO
from metr.data.joint import open_joint
from metr.errors import ConfigError, DataError, ModelError
from metr.model import METR
from metr.structures import Memory
from metr.text.encoder import TextEncoderConfig

from tiny import TinyRun, write_text_model

HEADS, LEVELS, POINTS, LAYERS = 4, 4, 3, 2
LABELS = ("N/A", "penguin", "shark", "N/A", "puffin", "bear")
NAMED = [1, 2, 4, 5]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextEncoderConfig:
    folder = tmp_path_factory.mktemp("text")
    write_text_model(folder)
    return TextEncoderConfig(source=str(folder), templates=("{}",))


class Dino:
    """DINO after its encoder (Zhang et al., 2023), from the weights of a file alone."""

    def __init__(self, state: Mapping[str, Tensor], learned: bool = True) -> None:
        self.state, self.learned = state, learned

    def __call__(self, memory: Memory, ratios: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [b p n] and boxes [b p 4] of the last layer."""
        anchors, usable = self._anchors(memory)
        tokens = memory.tokens.masked_fill(~usable, 0.0)
        features = self._norm("transformer.enc_output_norm", self._linear("transformer.enc_output", tokens))
        scores = self._linear("transformer.enc_out_class_embed", features).amax(-1)
        places = scores.topk(12, dim=1).indices.unsqueeze(-1)
        start = self._mlp("transformer.enc_out_bbox_embed.layers", features) + anchors
        boxes = start.gather(1, places.expand(-1, -1, 4)).sigmoid()
        content = features.gather(1, places.expand(-1, -1, features.shape[-1]))
        if self.learned:
            content = self.state["transformer.tgt_embed.weight"].expand(len(boxes), -1, -1)
        for layer in range(LAYERS):
            reference = boxes.unsqueeze(2) * torch.cat([ratios, ratios], -1).unsqueeze(1)
            position = self._mlp("transformer.decoder.ref_point_head.layers", self._sines(reference[:, :, 0]))
            content = self._layer(layer, content, position, reference, memory)
            normed, before = self._norm("transformer.decoder.norm", content), self._inverse(boxes)
            found = (self._mlp(f"bbox_embed.{layer}.layers", normed) + before).sigmoid()
            boxes = (self._mlp(f"bbox_embed.{layer}.layers", content) + before).sigmoid()
        return self._linear(f"class_embed.{LAYERS - 1}", normed), found

    def _layer(self, layer: int, content: Tensor, position: Tensor, reference: Tensor, memory: Memory) -> Tensor:
        """Self-attention, then deformable attention, then the feed-forward part."""
        key = f"transformer.decoder.layers.{layer}"
        placed = (content + position).transpose(0, 1)
        seen, _ = multi_head_attention_forward(
            placed,
            placed,
            content.transpose(0, 1),
            content.shape[-1],
            HEADS,
            self.state[f"{key}.self_attn.in_proj_weight"],
            self.state[f"{key}.self_attn.in_proj_bias"],
            None,
            None,
            False,
            0.0,
            self.state[f"{key}.self_attn.out_proj.weight"],
            self.state[f"{key}.self_attn.out_proj.bias"],
        )
        content = self._norm(f"{key}.norm2", content + seen.transpose(0, 1))
        seen = self._sampled(f"{key}.cross_attn", content + position, reference, memory)
        content = self._norm(f"{key}.norm1", content + seen)
        widened = relu(self._linear(f"{key}.linear1", content))
        return self._norm(f"{key}.norm3", content + self._linear(f"{key}.linear2", widened))

    def _sampled(self, key: str, query: Tensor, reference: Tensor, memory: Memory) -> Tensor:
        batch, queries, width = query.shape
        value = self._linear(f"{key}.value_proj", memory.tokens).masked_fill(memory.padding_mask.unsqueeze(-1), 0.0)
        offsets = self._linear(f"{key}.sampling_offsets", query).view(batch, queries, HEADS, LEVELS, POINTS, 2)
        weights = self._linear(f"{key}.attention_weights", query).view(batch, queries, HEADS, LEVELS * POINTS)
        weights = weights.softmax(-1).view(batch, queries, HEADS, LEVELS, POINTS)
        boxes = reference[:, :, None, :, None]
        places = boxes[..., :2] + offsets / POINTS * boxes[..., 2:] * 0.5
        shapes = [list(shape) for shape in memory.level_shapes]
        value = value.view(batch, -1, HEADS, width // HEADS)
        seen = MultiScaleDeformableAttention()(value, torch.tensor(shapes), shapes, None, places, weights, 64)
        return self._linear(f"{key}.output_proj", seen)

    def _anchors(self, memory: Memory) -> tuple[Tensor, Tensor]:
        """An anchor a cell, before the sigmoid, and whether it counts."""
        found, first = [], 0
        for level, (height, width) in enumerate(memory.level_shapes):
            mask = memory.padding_mask[:, first : first + height * width].view(-1, height, width)
            first += height * width
            seen = torch.stack([(~mask[:, 0]).sum(1), (~mask[:, :, 0]).sum(1)], 1)[:, None, None]
            rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            centres = (torch.stack([columns, rows], -1) + 0.5) / seen
            boxes = torch.cat([centres, torch.full_like(centres, 0.05 * 2**level)], -1)
            found.append(boxes.flatten(1, 2))
        anchors = torch.cat(found, 1)
        usable = ((anchors > 0.01) & (anchors < 0.99)).all(-1, keepdim=True) & ~memory.padding_mask.unsqueeze(-1)
        return (anchors / (1 - anchors)).log().masked_fill(~usable, torch.inf), usable

    def _sines(self, boxes: Tensor) -> Tensor:
        """Sines and cosines of y, x, w and h, with 16 numbers each."""
        index = torch.arange(16)
        angles = boxes[..., [1, 0, 2, 3], None] * 2 * torch.pi / 10_000 ** (2 * (index // 2) / 16)
        return torch.where(index % 2 == 0, angles.sin(), angles.cos()).flatten(-2)

    def _inverse(self, boxes: Tensor) -> Tensor:
        return (boxes.clamp(0, 1).clamp(min=1e-3) / (1 - boxes.clamp(0, 1)).clamp(min=1e-3)).log()

    def _mlp(self, key: str, features: Tensor) -> Tensor:
        count = sum(name.startswith(f"{key}.") and name.endswith("weight") for name in self.state)
        for number in range(count):
            features = self._linear(f"{key}.{number}", relu(features) if number else features)
        return features

    def _linear(self, key: str, features: Tensor) -> Tensor:
        return linear(features, self.state[f"{key}.weight"], self.state[f"{key}.bias"])

    def _norm(self, key: str, features: Tensor) -> Tensor:
        return layer_norm(features, (features.shape[-1],), self.state[f"{key}.weight"], self.state[f"{key}.bias"])


def kinds_of_file(kind: str) -> dict[str, Tensor]:
    """A file of DINO: as published, with a head a layer, or with the features of places as contents."""
    _, state = dino_like(authors=False, labels=len(LABELS))
    torch.manual_seed(5)
    if kind == "unshared":
        for key in [key for key in state if key.startswith(("class_embed.1.", "bbox_embed.1."))]:
            state[key] = state[f"transformer.decoder.{key}"] = torch.randn_like(state[key])
    elif kind == "features":
        del state["transformer.tgt_embed.weight"]
    return state


def asked(model: METR, images: Tensor, padding: Tensor, names: list[str]) -> tuple[Tensor, Tensor, Memory]:
    """METR's logits [b p v] and boxes [b p 4] of the last layer, and its memory."""
    memory = model.network.encode(images, padding)
    output = model.network.detect(memory, model.embed(names), limits=model.predictor(names).limits)
    logits = output.logits[-1].reshape(len(images), len(names), -1).transpose(1, 2)
    return logits, output.boxes[-1].reshape(len(images), len(names), -1, 4)[:, 0], memory


@pytest.mark.parametrize("kind", ["published", "unshared", "features"])
@torch.no_grad()
def test_the_same_places_boxes_and_logits(kind: str, tmp_path: Path, text: TextEncoderConfig) -> None:
    state = kinds_of_file(kind)
    options = Namespace(nheads=HEADS, num_queries=12)
    torch.save({"model": state, "args": options}, tmp_path / "dino.pth")
    ours, report = import_detector(tmp_path / "dino.pth", LABELS, text=text, device="cpu")
    names = [LABELS[row] for row in NAMED]
    assert list(ours.names) == names
    images = random_images()
    padding = torch.zeros(2, *images.shape[2:], dtype=torch.bool)
    padding[1, :, 70:] = True
    logits, boxes, memory = asked(ours, images, padding, names)
    # METR chooses places by the labels that have names
    for part in ("weight", "bias"):
        key = f"transformer.enc_out_class_embed.{part}"
        state[key] = state[key][NAMED]
    wanted, where = Dino(state, kind != "features")(memory, memory.valid_ratios)
    torch.testing.assert_close(boxes, where, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits, wanted[..., NAMED], atol=1e-3, rtol=0)
    assert report.start == "", "it is a detector already"
    for key in report.afresh:
        assert key.startswith(("category_extraction.", "denoising.")), key
    for key in report.left_over:
        assert key.startswith("label_enc."), key
    assert ours.resize.mode == "fit"
    assert ours.resize.size == 800


def test_labels_of_coco_are_known_by_their_number(tmp_path: Path, text: TextEncoderConfig) -> None:
    assert len(COCO) == 91
    assert COCO[1] == "person"
    assert COCO[90] == "toothbrush"
    assert sum(name == "N/A" for name in COCO) == 11
    _, state = dino_like(authors=False)
    torch.save({"model": state, "args": Namespace(nheads=HEADS)}, tmp_path / "dino.pth")
    ours, report = import_detector(tmp_path / "dino.pth", text=text, device="cpu")
    assert len(ours.names) == 80
    assert any("taken for COCO's" in note for note in report.notes)
    others, _ = import_detector(tmp_path / "dino.pth", ["zebra", "okapi"], text=text, device="cpu")
    assert others.names == ("zebra", "okapi")
    own = [f"kind {number}" for number in range(91)]
    given, report = import_detector(tmp_path / "dino.pth", own, text=text, device="cpu")
    assert given.names == tuple(own)
    assert not any("COCO" in note for note in report.notes)


def test_labels_without_a_category(tmp_path: Path, text: TextEncoderConfig) -> None:
    torch.save({"model": kinds_of_file("published"), "args": Namespace(nheads=HEADS)}, tmp_path / "dino.pth")
    with pytest.raises(ConfigError, match=r"expected 6 names, one a label.*found 4"):
        from_detector(tmp_path / "dino.pth", ["penguin", "shark", "puffin", "bear"], text=text, device="cpu")
    with pytest.raises(ConfigError, match="does not say what it finds"):
        from_detector(tmp_path / "dino.pth", text=text, device="cpu")
    written = read_names("N/A, penguin, shark, N/A, puffin, bear")
    ours = from_detector(tmp_path / "dino.pth", written, text=text, device="cpu")
    assert ours.names == ("penguin", "shark", "puffin", "bear")


def saved(path: Path, without: str = "", reshaped: str = "", **args: object) -> Path:
    """A file of DINO with these options, without one tensor, or with one of another shape."""
    state = kinds_of_file("published")
    state = {key: tensor for key, tensor in state.items() if key != without}
    if reshaped:
        state[reshaped] = torch.zeros(7, 3)
    torch.save({"model": state, "args": Namespace(**({"nheads": HEADS} | args))}, path)
    return path


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        ({"without": "transformer.decoder.layers.1.norm3.weight"}, r"not whole: .*layers.1.norm3.weight is missing"),
        ({"reshaped": "transformer.decoder.layers.1.linear1.weight"}, r"linear1.weight: expected .*found \[7, 3\]"),
        ({"nheads": "four"}, r"args.nheads: expected a whole number .*found 'four'"),
        ({"nheads": None}, r"args.nheads: expected a whole number .*found None"),
        ({"nheads": 0}, r"args.nheads: expected a whole number above 0 that divides 32, found 0"),
        ({"nheads": 5}, r"args.nheads: expected a whole number above 0 that divides 32, found 5"),
        ({"nheads": 8}, r"expected the shape .* by the other tensors"),
        ({"num_queries": "x"}, r"args.num_queries: expected a whole number above 0, found 'x'"),
        ({"two_stage_type": "no"}, r"METR needs args.two_stage_type = 'standard', found 'no'"),
        ({"num_patterns": 3}, r"METR needs args.num_patterns = 0, found 3"),
        ({"num_feature_levels": 5}, r"METR needs args.num_feature_levels = 4, found 5"),
        ({"dilation": True}, r"METR needs args.dilation = False, found True"),
        ({"pe_temperatureH": 10000}, r"METR needs args.pe_temperatureH = 20, found 10000"),
    ],
)
def test_a_file_that_metr_would_answer_otherwise_for(harm: dict[str, object], told: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=told):
        from_detector(saved(tmp_path / "dino.pth", **harm), LABELS)


def test_heads_that_a_file_does_not_tell_are_assumed(tmp_path: Path, text: TextEncoderConfig) -> None:
    torch.save(kinds_of_file("published"), tmp_path / "dino.pth")
    with pytest.raises(ModelError, match="it does not tell how many attention heads it has: 8 are assumed"):
        from_detector(tmp_path / "dino.pth", LABELS, text=text)


def test_names_that_are_longer_than_a_path_and_one_with_a_slash() -> None:
    many = [f"kind {number} of fish" for number in range(90)]
    assert read_names(", ".join(many)).names == tuple(many)
    with pytest.raises(ModelError, match=r'(?s)and/or sign: no such dataset.*if it is a name: "and/or sign,"'):
        read_names("and/or sign")
    assert read_names("and/or sign,").names == ("and/or sign",)


def test_names_of_several_datasets(tiny_run: TinyRun) -> None:
    pond, desk = (str(path) for path in tiny_run.datasets[:2])
    both = open_joint([pond, desk]).vocabulary.names
    assert read_names(f"{pond}, {desk}").names == both
    assert read_names(f"one={pond},two={desk}").names == both
    with pytest.raises(DataError, match="names alone"):
        read_names(f"{pond}, zebra")
