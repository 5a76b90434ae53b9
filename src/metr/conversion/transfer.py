"""`metr transfer --to`: METR becomes a detector of transformers."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from safetensors import SafetensorError

from metr.conversion.asked_names import datasets_of, read_names
from metr.conversion.convert import TransferReport, show
from metr.conversion.distillation import STEPS, distil
from metr.conversion.export import Transferred, colours_of
from metr.conversion.export import transfer as transfer_weights
from metr.conversion.images_to_fit import (
    FEW_IMAGES,
    Picture,
    asking,
    fitted,
    has_use,
    need_use,
    pictures_at,
    pictures_of,
    readable,
)
from metr.conversion.targets import find_target
from metr.conversion.trainer import how_to_go_on, keep_aliases, trainer_batch, trainer_images, trainer_result
from metr.errors import CheckpointError, ConfigError, counted
from metr.hub import quiet
from metr.model import METR
from metr.run_directory import explained_disk_errors, refuse_other_content, replaced_folder
from metr.serialization import read_json, write_json
from metr.text.same_names import Untrained, listed, told, with_trained_prompts
from metr.text.vocabulary import Vocabulary
from metr.writable import check_folder_to_replace

__all__ = [
    "REPORT",
    "to_detector",
    "trainer_batch",
    "trainer_images",
    "trainer_result",
    "transfer",
]

REPORT = "transfer.json"
"""What became of every weight, in the folder of the detector."""
_WRITTEN = "files"  # the key of the report that says which files were written, and their digests
_NOTHING_SEEN = "METR is sure of none of these names in the images, so they teach nothing"
_BACKBONE = "all but its backbone starts afresh"


def to_detector(
    model: METR,
    target: str,
    names: Sequence[str] | Vocabulary | None = None,
    *,
    images: Sequence[Picture] = (),
    steps: int = STEPS,
    console: Console | None = None,
) -> Transferred:
    """A METR's weights in a detector of transformers, for any list of names.

    Args:
        model: The METR.
        target: The detector: deformable_detr, rt_detr, ...
        names: What it is to find, label by label; by default what the METR looks for by default.
        images: Images of such things, some dozens; labels are not needed. Where queries of METR have no exact
            counterpart (`queries.layout` other than `places`), their start and the class heads are fitted to them, and
            then the decoder is taught what the METR finds in them.
        steps: How many steps teach it, of 8 images each; none: the fit alone.
        console: Where progress is shown.

    Raises:
        ConfigError: there is no such detector, or a name is empty or given twice.
        DataError: there are images, and none can be read.
        ModelError: the detector cannot be built for this METR, or a name is new and there is no text encoder.
    """
    found = find_target(target)
    wanted = _wanted(model, names)
    new, text = model.untrained(wanted), model.embed(wanted, tell=False)
    asked = asking(model, wanted, text)
    pictures = readable(images) if has_use(found, model) else []
    fits = fitted(asked, pictures, console)
    done = transfer_weights(found, model.network, wanted.names, text, fits=fits)
    number = len(pictures)
    if pictures and steps > 0:
        done = distil(done, found, asked, pictures, steps, console)
        number = number if done.report.taught else 0
    few = f"{counted(number, 'image')} to fit to are few: {FEW_IMAGES} or more make a better fit"
    notes = (
        *done.report.notes,
        *([few] if 0 < number < FEW_IMAGES else []),
        *found.resizes_otherwise(model.resize, model.network.backbone.pad_to),
        *filter(None, [told(new)]),
    )
    keep_aliases(done.model, model.checkpoint.detection.aliases)
    start = "" if done.same_answers or number else _why_a_start(found.fits(model.network.config), new)
    start = _NOTHING_SEEN if pictures and not number else start
    known = [name for name in wanted.names if name in model.checkpoint.detection.calibration]
    scores = (f"the calibration of {counted(len(known), 'name')} stays with METR: scores here are not probabilities",)
    differences = scores if known and not done.report.taught else ()
    report = replace(done.report, notes=notes, differences=differences, start=start, fitted_to=number)
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
    steps: int | None = None,
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
            heads are fitted to, and the decoder is taught on, where METR's have no exact counterpart. By default the
            training images of the dataset in `names`.
        steps: How many steps teach it, of 8 images each; none: the fit alone. By default 300.
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
        pictures = pictures_of(datasets_of(names))
    if steps and not pictures:
        what = "there are no images to teach the detector on"
        raise ConfigError(what, where="steps", hint="name some with --images, or leave it out")
    done = to_detector(model, target, wanted, images=pictures, steps=STEPS if steps is None else steps, console=console)
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
        CheckpointError: it is such a folder, or it cannot be written.
    """
    refuse_other_content(out, REPORT)
    check_folder_to_replace(out)
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
