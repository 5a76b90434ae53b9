"""`metr transfer --from`: other detectors become METR, and find what they found."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor

from metr.checkpoint import Checkpoint, DetectionDefaults
from metr.config import Tree
from metr.conversion.asked_names import read_names
from metr.conversion.class_heads import stands_for_none, told_apart
from metr.conversion.convert import TransferReport, show
from metr.conversion.import_ import PublishedDetector, adopt, read_published
from metr.data.config import ResizeConfig
from metr.devices import resolved_device
from metr.errors import CheckpointError, ConfigError, ModelError
from metr.model import METR
from metr.sharing.push import save
from metr.sources import DetectorSource, find_source
from metr.text.config import TextEncoderConfig
from metr.text.encoder import TextEncoder
from metr.text.vocabulary import Vocabulary
from metr.training.config import load_recipe
from metr.training.finetune_recipe import RECIPE, left_to_finetuning
from metr.writable import check_folder_to_replace

logger = logging.getLogger(__name__)


def from_detector(
    source: str | Path | DetectorSource,
    names: Sequence[str] | Vocabulary | None = None,
    *,
    text: TextEncoderConfig | None = None,
    device: str | torch.device = "auto",
    **options: Any,
) -> METR:
    """A METR that starts from the weights of another detector, and where it can, finds what the other finds.

    Args:
        source: A folder of transformers (DETR, Deformable, DAB or Conditional DETR, RT-DETR, D-FINE, DEIMv2, LW-DETR,
            RF-DETR), its name on the hub ("user/name", "user/name@revision"), or a `.pth` file of DINO or of METR's
            authors.
            Nothing in it is executed.
        names: The vocabulary; by default the detector's labels. A file of DINO has no names: give one a label, "N/A"
            for a label without a category; its labels are taken for COCO's if there are 91 and you give none or other
            names. A file of METR's authors has none either: give as many as it has embeddings, in their order, or
            others.
        text: The text encoder; by default the bundled one.
        device: Where the network goes.
        options: How the hub is asked, as of `METR.from_pretrained`: `revision`, `token`, `cache_dir`,
            `local_files_only`, `force_download`.

    Raises:
        CheckpointError: a file is missing, damaged, or would have to run code; or the hub does not give it.
        ConfigError: the detector names nothing and no names are given, or a name is empty or given twice.
        ModelError: METR has no counterpart of the detector, or the text encoder cannot be loaded.
    """
    model, report = import_detector(source, names, text=text, device=device, **options)
    for difference in report.differences:
        logger.warning("not all is found as %s finds it: %s", report.source, difference)
    return model


def import_detector(
    source: str | Path | DetectorSource,
    names: Sequence[str] | Vocabulary | None = None,
    *,
    text: TextEncoderConfig | None = None,
    device: str | torch.device = "auto",
    **options: Any,
) -> tuple[METR, TransferReport]:
    """As `from_detector`, with the report of what became of every weight."""
    place = resolved_device(device)
    found = source if isinstance(source, DetectorSource) else find_source(source, **options)
    if found.kind == "metr":
        hint = "it needs no conversion: metr.METR.from_pretrained, or its name after the command"
        raise ModelError("is a METR already", where=found.called, hint=hint)
    published = read_published(found)
    given = published.names if names is None else names
    if not given:
        hint = 'name what it is to find: metr transfer --from SOURCE --names "penguin, shark" -o OUT, or names=[...]'
        raise ConfigError(f"{published.title} does not say what it finds", where=found.called, hint=hint)
    wanted = given if isinstance(given, Vocabulary) else Vocabulary.of(told_apart(given))
    published = _with_label_names(published, wanted)
    vocabulary = _of_categories(wanted)
    encoder = TextEncoder(text)
    embeddings = encoder.embed(vocabulary)
    if published.prompts is not None and published.prompts.shape == embeddings.shape:
        embeddings = published.prompts.to(embeddings)
    network, report = adopt(published, embeddings, _labels(published, vocabulary, encoder))
    checkpoint = Checkpoint(
        model=published.config,
        vocabulary=vocabulary,
        text_embeddings=embeddings,
        text_encoder=encoder.pinned_config.model_dump(mode="json") | {"identity": encoder.identity},
        preprocessing=(published.resize or ResizeConfig()).model_dump(mode="json"),
        training={
            "started from": f"{published.title} ({found.public_name})",
            RECIPE: _rates(network.backbone.multiple),
        },
        detection=DetectionDefaults(presence=published.class_heads is None),
    )
    rebuilt = replace(checkpoint, model=published.config.model_copy(update={"backbone": network.backbone.config}))
    if published.class_heads is None:
        report = replace(report, start="all that has to do with names starts afresh: no image was seen with it")
    model = METR(network.to(place), rebuilt, found.called)
    model.source = found
    return model, report


def _labels(published: PublishedDetector, wanted: Vocabulary, encoder: TextEncoder) -> Float[Tensor, "n t"] | None:
    """Text embeddings of the labels whose class heads METR takes over; wanted names keep their prompts."""
    heads = published.class_heads
    if heads is None:
        return None
    return encoder.embed(Vocabulary.of(heads.names, {n: p for n, p in wanted.prompts.items() if n in heads.names}))


def _with_label_names(published: PublishedDetector, wanted: Vocabulary) -> PublishedDetector:
    """The detector with class heads of named labels only.

    Labels that the detector does not name are taken for the wanted names, if there are as many.

    Raises:
        ConfigError: nothing says what the labels are.
    """
    heads = published.class_heads
    if heads is None:
        return published
    if (heads.assumed or not heads.names) and len(wanted) == heads.labels:
        heads = replace(heads, names=wanted.names, assumed=False)
    if not heads.names:
        what = f"expected {heads.labels} names, one a label, since the detector does not name its labels"
        hint = 'write "N/A" for a label without a category, such as label 0 of many detectors'
        raise ConfigError(f"{what}; found {len(wanted)}", where="names", hint=hint)
    return replace(published, class_heads=heads.named(heads.names))


def _of_categories(wanted: Vocabulary) -> Vocabulary:
    """The wanted names without those of labels that have no category."""
    if not any(map(stands_for_none, wanted.names)):
        return wanted
    return Vocabulary.of([name for name in wanted.names if not stands_for_none(name)], wanted.prompts)


def _rates(multiple: int) -> Tree:
    """Settings that fine-tuning starts from: batch and optimizer of METR base.

    Losses and augmentation are METR's own, because the detector's files do not say how it was trained.
    """
    told = left_to_finetuning(load_recipe("base", overrides=[f"loader.multiple={multiple}"]))
    return {part: told[part] for part in ("loader", "train")}


def adopt_file(
    source: str | Path, out: Path, *, names: str | None, text: str | None, console: Console
) -> TransferReport:
    """Writes a METR checkpoint that starts from another detector.

    Args:
        source: As `from_detector`.
        out: Where to; an empty folder, or none yet.
        names: Names between commas, or a dataset, whose names they are; by default the detector's labels.
        text: The text encoder's folder or hub name; by default the bundled one.
        console: Where the report goes.

    Raises:
        CheckpointError: as `from_detector`, or `out` holds something or cannot be written.
        ConfigError: as `from_detector`.
        DataError: the dataset cannot be read.
        ModelError: as `from_detector`.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "exists already, and is not overwritten"
        raise CheckpointError(what, where=out, hint="name another folder, or move this one away")
    check_folder_to_replace(out)
    wanted = None if names is None else read_names(names)
    encoder = None if text is None else TextEncoderConfig(source=text)
    model, report = import_detector(source, wanted, text=encoder, device="cpu")
    save(model, out)
    show(report, out, console, f"go on with: metr finetune DATA --from {out} -o RUN")
    return report
