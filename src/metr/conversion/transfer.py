"""`metr transfer`: METR becomes a detector of transformers, and other detectors become METR."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Console
from safetensors import SafetensorError
from torch import Tensor

from metr.checkpoint import Checkpoint, DetectionDefaults
from metr.config import Tree
from metr.conversion.class_heads import stands_for_none, told_apart
from metr.conversion.convert import TransferReport, show
from metr.conversion.export import Transferred, colours_of
from metr.conversion.export import transfer as transfer_weights
from metr.conversion.images_to_fit import FEW_IMAGES, Picture, fitted, has_use, need_use, pictures_at, pictures_of
from metr.conversion.import_ import PublishedDetector, adopt, read_published
from metr.conversion.targets import find_target
from metr.conversion.trainer import how_to_go_on, keep_aliases, trainer_batch, trainer_images, trainer_result
from metr.data.config import ResizeConfig
from metr.data.joint import open_joint
from metr.devices import resolved_device
from metr.errors import CheckpointError, ConfigError, DataError, ModelError, counted
from metr.hub import quiet
from metr.model import METR
from metr.run_directory import explained_disk_errors, refuse_other_content, replaced_folder
from metr.serialization import read_json, write_json
from metr.sharing.push import save
from metr.sources import DetectorSource, find_source
from metr.text.config import TextEncoderConfig
from metr.text.encoder import TextEncoder
from metr.text.same_names import Untrained, listed, told, with_trained_prompts
from metr.text.vocabulary import Vocabulary
from metr.training.config import load_recipe
from metr.training.finetune_recipe import RECIPE, left_to_finetuning

__all__ = [
    "REPORT",
    "adopt_file",
    "from_detector",
    "import_detector",
    "to_detector",
    "trainer_batch",
    "trainer_images",
    "trainer_result",
    "transfer",
]

logger = logging.getLogger(__name__)

REPORT = "transfer.json"
"""What became of every weight, in the folder of the detector."""
_WRITTEN = "files"  # the key of the report that says which files were written, and their digests
_FILES = frozenset({".yaml", ".yml", ".json", ".csv", ".txt", ".xml", ".parquet", ".zip", ".tar", ".tgz", ".gz"})
"""How files of datasets end, which are no names."""
_BACKBONE = "all but its backbone starts afresh"


def to_detector(
    model: METR,
    target: str,
    names: Sequence[str] | Vocabulary | None = None,
    *,
    images: Sequence[Picture] = (),
    console: Console | None = None,
) -> Transferred:
    """A METR's weights in a detector of transformers, for any list of names.

    Args:
        model: The METR.
        target: The detector: deformable_detr, rt_detr, ...
        names: What it is to find, label by label; by default what the METR looks for by default.
        images: Images of such things, some dozens; labels are not needed. Where queries of METR have no exact
            counterpart (`queries.layout` other than `places`), their start and the class heads are fitted to them.
        console: Where progress is shown.

    Raises:
        ConfigError: there is no such detector, or a name is empty or given twice.
        DataError: there are images, and none can be read.
        ModelError: the detector cannot be built for this METR, or a name is new and there is no text encoder.
    """
    found = find_target(target)
    wanted = _wanted(model, names)
    new, text = model.untrained(wanted), model.embed(wanted, tell=False)
    fits = fitted(model, found, wanted, text, images, console)
    done = transfer_weights(found, model.network, wanted.names, text, fits=fits)
    number = 0 if fits is None else fits.images
    few = f"{counted(number, 'image')} to fit to are few: {FEW_IMAGES} or more make a better fit"
    notes = (
        *done.report.notes,
        *([few] if 0 < number < FEW_IMAGES else []),
        *found.resizes_otherwise(model.resize, model.network.backbone.pad_to),
        *filter(None, [told(new)]),
    )
    keep_aliases(done.model, model.checkpoint.detection.aliases)
    start = "" if done.same_answers or number else _why_a_start(found.fits(model.network.config), new)
    known = [name for name in wanted.names if name in model.checkpoint.detection.calibration]
    scores = (f"the calibration of {counted(len(known), 'name')} stays with METR: scores here are not probabilities",)
    report = replace(done.report, notes=notes, differences=scores if known else (), start=start, fitted_to=number)
    return replace(done, report=report)


def _why_a_start(fits: bool, new: Sequence[Untrained]) -> str:
    head = "its classification head was computed from the names" if fits else _BACKBONE
    never = f"; never trained: {listed([one.called for one in new])}" if new else ""
    return f"{head}: no image was seen with it{never}"


def _wanted(model: METR, names: Sequence[str] | Vocabulary | None) -> Vocabulary:
    """What a transferred detector is to find; trained names with the prompts of training."""
    if isinstance(names, Vocabulary):
        return names
    own = model.vocabulary.prompts
    plain = Vocabulary.of(model.default_names if names is None else names)
    return Vocabulary.of(plain.names, {name: own[name] for name in plain.names if name in own})


def transfer(
    source: METR | str | Path,
    target: str,
    out: str | Path,
    *,
    names: str | Sequence[str] | Vocabulary | None = None,
    images: str | Path | None = None,
    console: Console | None = None,
) -> TransferReport:
    """Writes a folder that `AutoModelForObjectDetection` and `AutoImageProcessor` of transformers load as it is.

    Where the backbone is EfficientNet-Lite, `metr.register()` makes it known to transformers first.

    Args:
        source: A METR, a run folder, a checkpoint folder, or a name on the hub.
        target: The detector: deformable_detr, rt_detr, ...
        out: Where to; it may hold what an earlier transfer wrote, if nothing was changed or added since.
        names: What the detector is to find, label by label. As one text: names between commas, or a dataset, whose
            names they are, or "all" for every name of training. By default what the METR looks for by default.
        images: A folder of images, a pattern, or a file that lists datasets: what the start of queries and the class
            heads are fitted to where METR's have no exact counterpart. By default the training images of the dataset
            in `names`.
        console: Where the report is shown.

    Raises:
        CheckpointError: the run cannot be read, `out` holds something else, or the disk refuses.
        ConfigError: there is no such detector, or a name is empty or given twice.
        DataError: the dataset cannot be read.
        ModelError: the detector cannot be built for this METR.
    """
    found, out = find_target(target), Path(out)
    _keep_what_was_changed(out)
    model = source if isinstance(source, METR) else METR.from_pretrained(source, device="cpu")
    wanted = _read_for(model, names) if isinstance(names, str) else names
    pictures = list[Picture]()
    if images is not None:
        need_use(found, model)
        pictures = pictures_at(images, out)
    elif isinstance(names, str) and has_use(found, model):
        pictures = pictures_of(_datasets(names))
    done = to_detector(model, target, wanted, images=pictures, console=console)
    processor = found.image_processor(model.resize, colours_of(model.network), model.network.backbone.pad_to)
    with explained_disk_errors(out), replaced_folder(out, REPORT) as fresh, quiet():
        try:
            done.model.save_pretrained(fresh)
        except SafetensorError as error:  # a full disk; what was to be written is in memory, and in order
            raise OSError(str(error)) from error
        processor.save_pretrained(fresh)
        write_json(fresh / REPORT, {**done.report.to_dict(), _WRITTEN: _digests(fresh)})
    show(done.report, out, console or Console(quiet=True), how_to_go_on(done.model, out))
    return done.report


def _digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file in a folder of a transferred detector, but for the report."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != REPORT:
            with path.open("rb") as file:
                digests[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _keep_what_was_changed(out: Path) -> None:
    """Refuses a folder that no transfer wrote, or in which a detector was trained since, or that holds more.

    Raises:
        CheckpointError: it is such a folder.
    """
    refuse_other_content(out, REPORT)
    if not (out / REPORT).is_file():
        return
    written = read_json(out / REPORT).get(_WRITTEN)
    now = _digests(out)
    if written != now:
        known = written if isinstance(written, dict) else {}
        changed = listed(sorted(name for name in now if known.get(name) != now[name]) or sorted(known))
        what = f"was changed since a transfer wrote it ({changed}), so it is not overwritten"
        raise CheckpointError(what, where=out, hint="name another folder, or move this one away")


def _read_for(model: METR, names: str) -> Vocabulary:
    """The names that a text means for this METR, trained ones with the prompts of training."""
    if names.strip() == "all":
        return model.vocabulary
    return with_trained_prompts(read_names(names), model.vocabulary)


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
        CheckpointError: as `from_detector`, or `out` holds something.
        ConfigError: as `from_detector`.
        DataError: the dataset cannot be read.
        ModelError: as `from_detector`.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "exists already, and is not overwritten"
        raise CheckpointError(what, where=out, hint="name another folder, or move this one away")
    wanted = None if names is None else read_names(names)
    encoder = None if text is None else TextEncoderConfig(source=text)
    model, report = import_detector(source, wanted, text=encoder, device="cpu")
    save(model, out)
    show(report, out, console, f"go on with: metr finetune DATA --from {out} -o RUN")
    return report


def read_names(names: str) -> Vocabulary:
    """The names of a dataset, label by label, or of several between commas; else names between commas.

    Raises:
        ConfigError: a name is empty or given twice.
        DataError: a dataset cannot be read, or names and datasets are mixed.
    """
    if not names.strip():
        raise ConfigError("expected names or a dataset, found nothing", where="names", hint='"penguin, shark"')
    if parts := _datasets(names):
        vocabulary = open_joint(parts).vocabulary
        return Vocabulary.of(vocabulary.names, vocabulary.prompts)
    if "," not in names and ("/" in names or Path(names.strip()).suffix.lower() in _FILES):
        raise ModelError("no such dataset", where=names, hint='names go between commas: "penguin, shark"')
    return Vocabulary.of(told_apart(names.split(",")))


def _datasets(names: str) -> list[str]:
    """The datasets that a text names, if it names datasets.

    Raises:
        DataError: names and datasets are mixed.
    """
    parts = [names] if _is_there(names) else [part.strip() for part in names.split(",")]
    there = [part for part in parts if _is_there(part) and (len(parts) == 1 or "/" in part)]
    if there and (strange := [part for part in parts if part not in there]):
        what = f"{there[0]} is a folder or file, and {strange[0]} is none"
        raise DataError(what, where=names, hint="name datasets alone, or names alone")
    return there


def _is_there(dataset: str) -> bool:
    return Path(dataset.partition("=")[2] or dataset).expanduser().exists()
