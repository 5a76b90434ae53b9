"""What the tests of DETR, Conditional DETR and DAB-DETR becoming METR share."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from conversion_cases import NAMES, SIDE, normalised, random_images, save_folder, stir, stirred
from timm_cases import rewritten
from torch import Tensor

from metr.conversion.export import build
from metr.conversion.targets import find_target
from metr.conversion.transfer import to_detector
from metr.losses.config import CriterionConfig
from metr.losses.criterion import SetCriterion
from metr.model import METR
from metr.models.config import DetectorConfig
from metr.models.detector import Detector
from metr.structures import Targets

from small import TEXT_WIDTH, targets_of

LABELS = (*NAMES, "bear", "otter")
FACTS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("single_scale_detectors.yaml").read_text())


def written(name: str, config: DetectorConfig, folder: Path) -> Any:
    """A folder of the detector with such a METR's layers and random weights, and the detector."""
    network = stirred(config)
    model = stir(build(find_target(name), network, LABELS, seed=3), by=0.3).eval()
    save_folder(model, name, network, folder)
    return model


def as_published(name: str, folder: Path) -> Any:
    """A folder with the files, keys and sizes of the published detector, of random weights, and the detector."""
    from transformers import CONFIG_MAPPING, AutoModelForObjectDetection, ResNetConfig

    facts = FACTS[name]
    labels = {number: facts["labels"].get(number, "N/A") for number in range(facts["num_labels"])}
    backbone: Any = ResNetConfig  # partly without types
    config = CONFIG_MAPPING[facts["model_type"]](
        **facts["values"], id2label=labels, backbone_config=backbone(out_features=["stage4"])
    )
    torch.manual_seed(0)
    model = stir(AutoModelForObjectDetection.from_config(config), by=0.03).eval()
    model.save_pretrained(folder)
    rewritten(folder, facts["backbone"], wrapped=facts.get("wrapped", False))
    (folder / "preprocessor_config.json").write_text(json.dumps(facts["preprocessor"]))
    return model


def padded_images(model: METR) -> tuple[Tensor, Tensor]:
    """Two images, one of them padded, and which pixels are padding."""
    images = random_images()
    padding = torch.zeros(2, *images.shape[2:], dtype=torch.bool)
    padding[1, :, SIDE:], padding[1, 32:] = True, True
    return images.where(~padding.unsqueeze(1), model.network.backbone.mean), padding


@torch.no_grad()
def same_answers(model: METR, theirs: Any, logits_of: Callable[[Tensor], Tensor], again: str = "") -> None:
    """Memory, boxes of the last layer and logits are the detector's; with `again` also those of what METR becomes.

    Args:
        model: METR.
        theirs: The detector.
        logits_of: From the detector's logits to those of METR's names.
        again: The detector's name.
    """
    images, padding = padded_images(model)
    pixels = {"pixel_values": normalised(model.network, images), "pixel_mask": (~padding).long()}
    wanted = theirs(**pixels, output_hidden_states=True)
    memory, names = model.network.encode(images, padding), model.names
    seen = (~memory.padding_mask).unsqueeze(-1)
    torch.testing.assert_close(memory.tokens * seen, wanted.encoder_last_hidden_state * seen, atol=5e-5, rtol=1e-4)
    output = model.network.detect(memory, model.embed(names), limits=model.predictor(names).limits)
    logits, boxes = output.logits[-1].reshape(2, len(names), -1), output.boxes[-1].reshape(2, len(names), -1, 4)
    torch.testing.assert_close(boxes[:, 0], wanted.pred_boxes, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits.transpose(1, 2), logits_of(wanted.logits), atol=1e-4, rtol=0)
    if again:
        # queries differ by more than what is allowed
        assert wanted.pred_boxes.std(1).max() > 1e-3
        assert logits.std(2).max() > 1e-3
        back = to_detector(model, again, names)
        assert back.report.notes == ()
        assert back.report.afresh == ()
        found = back.model(**pixels)
        torch.testing.assert_close(found.pred_boxes, wanted.pred_boxes, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.logits, wanted.logits, atol=1e-4, rtol=0)


def trains(config: DetectorConfig) -> None:
    """Every weight gets a gradient, and a few steps lower the loss."""
    torch.manual_seed(0)
    network, criterion = Detector(config, TEXT_WIDTH), SetCriterion(CriterionConfig())
    images, words = torch.rand(2, 3, SIDE, SIDE), torch.nn.functional.normalize(torch.randn(3, TEXT_WIDTH), dim=-1)
    boxes = ([[0.3, 0.4, 0.2, 0.3]], [[0.6, 0.5, 0.4, 0.4]])
    targets = Targets.stack([targets_of(box, [row], words=3) for row, box in enumerate(boxes)])
    optimizer, totals = torch.optim.AdamW(network.parameters(), lr=1e-3), []
    for _ in range(6):
        optimizer.zero_grad()
        losses, _ = criterion(network(images, torch.zeros(2, SIDE, SIDE, dtype=torch.bool), words, targets), targets)
        losses.total.backward()
        optimizer.step()
        totals.append(losses.total.item())
    assert totals[-1] < totals[0]
    assert [name for name, one in network.named_parameters() if one.requires_grad and one.grad is None] == []
