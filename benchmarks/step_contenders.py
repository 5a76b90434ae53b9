"""The contenders of `step.py`, METR-base and transformers' Deformable DETR, and the batch that both see."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn, optim
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

from metr.devices import autocast
from metr.errors import ConfigError
from metr.losses.criterion import SetCriterion
from metr.losses.predictions import query_predictions
from metr.models.detector import Detector
from metr.structures import Targets
from metr.training.recipe import RunConfig, load_recipe

TEXT_WIDTH = 512
_CATEGORIES_SHOWN = 6  # in an image
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command line says."""

    size: int = 640  # pixels a side
    batch: int = 1
    repeats: int = 5  # counted rounds; one more warms up
    names: int = 80
    queries: int = 300
    objects: int = 15  # an image, on average
    denoising: int = 100  # queries, in the further measurement
    backbone: str = "resnet50"
    layers: int = 6  # of encoder and decoder each
    feed_forward: int = 1024
    threads: int = 0  # 0: as many as torch likes
    device: str = "auto"
    precision: str = "fp32"
    results: Path = RESULTS

    @property
    def torch_device(self) -> torch.device:
        """The device, `auto` resolved."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("torch finds no CUDA device", where="--device", hint="--device cpu")
        return torch.device(self.device)

    def recipe(self, denoising: int) -> RunConfig:
        """METR-base with random weights, as large as the settings say."""
        model: dict[str, Any] = {
            "backbone": {"name": self.backbone, "pretrained": False, "freeze_stages": 0},
            "encoder": {"layers": self.layers, "feed_forward": self.feed_forward},
            "decoder": {"layers": self.layers, "feed_forward": self.feed_forward},
            "queries": {"number": self.queries, "ceiling": self.queries},
            "denoising": {"number": denoising},
        }
        return load_recipe("base", changes={"model": model})


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One batch that all contenders see: noise, and objects of a natural image's number and sizes."""

    images: Tensor
    padding_mask: Tensor
    text: Tensor
    targets: Targets

    @staticmethod
    def of(settings: Settings) -> "Scene":
        """The same scene whenever the settings are the same."""
        random = torch.Generator().manual_seed(0)
        images = torch.rand(settings.batch, 3, settings.size, settings.size, generator=random)
        text = nn.functional.normalize(torch.randn(settings.names, TEXT_WIDTH, generator=random), dim=-1)
        targets = Targets.stack([_objects(settings, random) for _ in range(settings.batch)])
        device = settings.torch_device
        mask = torch.zeros(len(images), *images.shape[2:], dtype=torch.bool, device=device)
        return Scene(images=images.to(device), padding_mask=mask, text=text.to(device), targets=targets.to(device))


def _objects(settings: Settings, random: torch.Generator) -> Targets:
    """About as many objects as asked for, of six categories; their sides' logarithms spread evenly, 1/60 to 1/2."""
    mean = settings.objects
    number = int(torch.randint(mean * 2 // 3, mean * 4 // 3 + 1, (1,), generator=random))
    shown = torch.randperm(settings.names, generator=random)[:_CATEGORIES_SHOWN]
    sides = (1 / 30) ** torch.rand(number, 2, generator=random) / 2
    centres = sides / 2 + torch.rand(number, 2, generator=random) * (1 - sides)
    return Targets(
        boxes=torch.cat([centres, sides], dim=1).unsqueeze(0),
        labels=shown[torch.randint(len(shown), (1, number), generator=random)],
        ignore_boxes=torch.zeros(1, 0, 4),
        ignore_labels=torch.zeros(1, 0, dtype=torch.int64),
        annotated=torch.ones(1, settings.names, dtype=torch.bool),
        assumed_negative=torch.zeros(1, settings.names, dtype=torch.bool),
    )


class Contender(Protocol):
    """A detector with its optimizer."""

    @property
    def network(self) -> nn.Module:
        """The detector."""

    def train_step(self) -> None:
        """Forward, matching, losses, backward, optimizer."""

    def infer(self) -> None:
        """Forward, without targets."""


class Metr:
    """METR-base."""

    def __init__(self, settings: Settings, scene: Scene, denoising: int = 0) -> None:
        recipe = settings.recipe(denoising)
        self.scene, self.settings, self.device = scene, settings, settings.torch_device
        self.network = Detector(recipe.model, TEXT_WIDTH).to(self.device)
        self.criterion = SetCriterion(recipe.criterion)
        self.optimizer = optim.AdamW(self.network.parameters(), lr=1e-6, fused=True)

    def train_step(self) -> None:
        """See `Contender`."""
        self.train_step_in_parts()

    def infer(self) -> None:
        """See `Contender`."""
        scene = self.scene
        with autocast(self.settings.precision, self.device):
            self.network(scene.images, scene.padding_mask, scene.text)

    def train_step_in_parts(self, reached: Callable[[str], None] = lambda _: None) -> None:
        """A training step that says which part it has just finished."""
        scene = self.scene
        with autocast(self.settings.precision, self.device):
            output = self.network(scene.images, scene.padding_mask, scene.text, scene.targets)
        reached("forward")
        predictions = query_predictions(output)
        matches = self.criterion.match(predictions, scene.targets)
        reached("matching")
        loss = self.criterion.losses(output, predictions.matched(matches), scene.targets).total
        reached("losses")
        loss.backward()  # type: ignore[no-untyped-call]
        reached("backward")
        self.optimizer.step()
        self.optimizer.zero_grad()
        reached("optimizer")


class Reference:
    """Transformers' Deformable DETR, equal to METR-base where the two have the same parts."""

    def __init__(self, settings: Settings, scene: Scene, model: Detector) -> None:
        config = model.config
        self.settings, self.device, self.images = settings, settings.torch_device, scene.images
        self.pixel_mask = (~scene.padding_mask).long()
        targets = scene.targets
        self.labels = [
            {"class_labels": labels[here], "boxes": boxes[here]}
            for labels, boxes, here in zip(targets.labels, targets.boxes, targets.is_object, strict=True)
        ]
        build: Any = DeformableDetrConfig
        backbone: Any = model.backbone
        same = build(
            num_labels=settings.names,
            backbone_config=deepcopy(backbone.network.config),
            num_queries=settings.queries,
            two_stage_num_proposals=settings.queries,
            d_model=config.width,
            encoder_layers=config.encoder.layers,
            encoder_attention_heads=config.encoder.heads,
            encoder_n_points=config.encoder.points,
            encoder_ffn_dim=config.encoder.feed_forward,
            num_feature_levels=config.encoder.levels,
            decoder_layers=config.decoder.layers,
            decoder_attention_heads=config.decoder.heads,
            decoder_n_points=config.decoder.points,
            decoder_ffn_dim=config.decoder.feed_forward,
            two_stage=True,
            with_box_refine=True,
            auxiliary_loss=True,
            dropout=0.0,
            disable_custom_kernels=True,
        )
        network: Any = DeformableDetrForObjectDetection(same)
        self.network: nn.Module = network.to(self.device).requires_grad_(True)
        self.optimizer = optim.AdamW(self.network.parameters(), lr=1e-6, fused=True)

    def train_step(self) -> None:
        """See `Contender`."""
        with autocast(self.settings.precision, self.device):
            output = self.network(self.images, self.pixel_mask, labels=self.labels)
        output.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def infer(self) -> None:
        """See `Contender`."""
        with autocast(self.settings.precision, self.device):
            self.network(self.images, self.pixel_mask)
