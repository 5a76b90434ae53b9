"""Checkpoints: a folder with the network, its vocabulary and all that detection needs. Nothing in it is a pickle."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from metr.config import Calibration, Config
from metr.errors import CheckpointError, ConfigError
from metr.models.config import DetectorConfig
from metr.run_directory import CONFIG, WEIGHTS, existing_folder, find_checkpoint, replaced_file, replaced_folder
from metr.serialization import read_json, read_tensors, write_json, write_tensors
from metr.text.same_names import TrainedWords
from metr.text.vocabulary import Vocabulary

__all__ = [
    "CARD",
    "CONFIG",
    "EMBEDDINGS",
    "EVALUATION",
    "FILES",
    "FORMAT_VERSION",
    "VOCABULARY",
    "WEIGHTS",
    "Checkpoint",
    "DetectionDefaults",
    "find_checkpoint",
    "is_untouched",
    "load_checkpoint",
    "persons_card",
    "save_checkpoint",
    "signed_card",
    "update_detection",
]

FORMAT_VERSION = 1
VOCABULARY, EMBEDDINGS = "vocabulary.json", "text_embeddings.safetensors"
CARD, EVALUATION = "README.md", "evaluation.json"
"""What may lie beside a checkpoint: its model card, and the report that the card is written from."""
FILES = (CONFIG, WEIGHTS, EMBEDDINGS, VOCABULARY, CARD, EVALUATION)
"""What a checkpoint on the hub consists of: nothing else is downloaded or sent."""
_EMBEDDINGS_KEY = "embeddings"
_SIGNATURE = re.compile(r"\n*<!-- written by METR[^>]*sha256 ([0-9a-f]{64})[^>]*-->\s*\Z")


class DetectionDefaults(Config):
    """What detection does with a checkpoint unless it is asked otherwise."""

    names: tuple[str, ...] = ()
    """The names that it looks for; none: all of the vocabulary."""
    calibration: dict[str, Calibration] = Field(default_factory=dict)
    """For some names, what makes their scores probabilities of being right."""
    thresholds: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(default_factory=dict)
    """For some names, the score from which a detection is shown."""
    aliases: dict[str, str] = Field(default_factory=dict)
    """Other names for names of the vocabulary: who asks for `RBC` means `rbc`."""
    presence: bool = True
    """Whether the presence of a name counts in its score; not while nothing has taught it."""

    def calibrated(
        self, found: Mapping[str, Calibration], thresholds: Mapping[str, float] | None = None
    ) -> "DetectionDefaults":
        """With these calibrations and thresholds too; older thresholds of such names, for other scores, go."""
        kept = {name: score for name, score in self.thresholds.items() if name not in found}
        return self.model_copy(
            update={"calibration": {**self.calibration, **found}, "thresholds": {**kept, **(thresholds or {})}}
        )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A trained detector as data.

    `weights` are by the keys of the network's state; `text_embeddings` are the vocabulary's rows. `text_encoder` and
    `preprocessing` are plain values (JSON) that their owners understand: what made the embeddings, and how an image
    becomes the network's input. `training` holds facts about training (step, metrics); detection needs none of them.
    `detection` is what detection does by default.
    """

    model: DetectorConfig
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    vocabulary: Vocabulary
    text_embeddings: Float[Tensor, "v t"]
    text_encoder: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    training: Mapping[str, Any] = field(default_factory=dict)
    detection: DetectionDefaults = field(default_factory=DetectionDefaults)

    @property
    def text_width(self) -> int:
        """Numbers of a text embedding."""
        return self.text_embeddings.shape[1]


def words_of(training: Mapping[str, Any]) -> TrainedWords:
    """What the datasets of training called their categories beside names.

    Args:
        training: Facts about training (`Checkpoint.training`); those of earlier training lie within.
    """
    renames: dict[str, dict[str, None]] = {}
    synonyms = set[str]()
    stage: Any = training
    while isinstance(stage, Mapping):
        datasets = stage.get("data")
        for facts in datasets.values() if isinstance(datasets, Mapping) else ():
            for old, new in _mapping(facts, "renames").items():
                renames.setdefault(str(old), {})[str(new)] = None
            for words in _mapping(facts, "synonyms").values():
                synonyms |= {str(word).strip() for word in words} if isinstance(words, (list, tuple)) else set()
        stage = stage.get("finetuned_from")
    return TrainedWords(renames={old: tuple(new) for old, new in renames.items()}, synonyms=frozenset(synonyms))


def _mapping(facts: object, key: str) -> Mapping[Any, Any]:
    value = facts.get(key) if isinstance(facts, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def found_nothing(metrics: Mapping[str, Any]) -> bool:
    """Whether AP was 0, as people read it, on every val split of an evaluation; False where none is known.

    Args:
        metrics: Those of the evaluation, 0 to 100, by name.
    """
    scores = [value for name, value in metrics.items() if name == "AP" or name.startswith("AP ")]
    return bool(scores) and all(isinstance(value, int | float) and round(value, 1) <= 0 for value in scores)


def save_checkpoint(
    folder: Path,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    beside: Mapping[str, str] | None = None,
) -> None:
    """Writes a checkpoint: whole, or not at all.

    Args:
        folder: Replaced if it holds a checkpoint, made if it is missing.
        checkpoint: What to write.
        dtype: Type of the weights on disk, such as `torch.float16`; unchanged by default.
        beside: Texts to write into the folder, such as a model card, by file name. A README.md that a person wrote in
            `folder` stays.

    Raises:
        CheckpointError: `folder` holds something else, or the disk refuses.
    """
    card = persons_card(folder)
    texts = {**(beside or {}), **({} if card is None else {CARD: card})}
    config = {
        "format": "metr",
        "format_version": FORMAT_VERSION,
        "model": checkpoint.model.model_dump(mode="json"),
        "text_width": checkpoint.text_width,
        "text_encoder": dict(checkpoint.text_encoder),
        "preprocessing": dict(checkpoint.preprocessing),
        "training": dict(checkpoint.training),
        "detection": checkpoint.detection.model_dump(mode="json"),
    }
    with replaced_folder(folder, CONFIG) as fresh:
        write_tensors(fresh / WEIGHTS, checkpoint.weights, dtype)
        write_tensors(fresh / EMBEDDINGS, {_EMBEDDINGS_KEY: checkpoint.text_embeddings})
        write_json(fresh / VOCABULARY, checkpoint.vocabulary.to_dict())
        write_json(fresh / CONFIG, config)
        for name, text in texts.items():
            (fresh / name).write_text(text, encoding="utf-8")


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint, or the best one of a run folder, with tensors on the CPU.

    Raises:
        CheckpointError: a file is missing, damaged, contradicts another or is from a newer version.
    """
    folder = find_checkpoint(path)
    config = read_json(folder / CONFIG)
    _check_format(config, folder / CONFIG)
    vocabulary = Vocabulary.from_dict(read_json(folder / VOCABULARY), where=folder / VOCABULARY)
    return Checkpoint(
        model=_model(config["model"], folder / CONFIG),
        weights=read_tensors(folder / WEIGHTS),
        vocabulary=vocabulary,
        text_embeddings=_embeddings(folder / EMBEDDINGS, len(vocabulary), config["text_width"]),
        text_encoder=config["text_encoder"],
        preprocessing=config["preprocessing"],
        training=config.get("training", {}),
        detection=_detection(config.get("detection", {}), vocabulary, folder / CONFIG),
    )


def update_detection(folder: Path, detection: DetectionDefaults) -> None:
    """Changes what detection does by default with a checkpoint on disk.

    Raises:
        CheckpointError: the folder holds no checkpoint, or it cannot be written.
    """
    config = read_json(folder / CONFIG)
    with replaced_file(folder / CONFIG, flush=True) as fresh:
        write_json(fresh, {**config, "detection": detection.model_dump(mode="json")})


def signed_card(text: str) -> str:
    """A model card with a last line by which `is_untouched` recognises that METR wrote it."""
    line = "written by METR, and anew whenever the weights are, unless a person changes it"
    return f"{text.rstrip()}\n\n<!-- {line}: sha256 {_digest(text)} -->\n"


def is_untouched(card: str) -> bool:
    """Whether a card is as METR wrote it. A card that a person wrote or changed is never written over."""
    signature = _SIGNATURE.search(card)
    return signature is not None and signature.group(1) == _digest(card[: signature.start()])


def persons_card(folder: Path) -> str | None:
    """The README.md of a folder, if a person wrote or changed it.

    Raises:
        CheckpointError: it is not readable as UTF-8.
    """
    path = existing_folder(folder) / CARD
    if not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        hint = "make it readable as UTF-8, or move it away"
        raise CheckpointError(f"cannot be read, and is not to be lost: {error}", where=path, hint=hint) from None
    return None if is_untouched(text) else text


def _digest(text: str) -> str:
    return hashlib.sha256("\n".join(text.rstrip().splitlines()).encode()).hexdigest()


def _check_format(config: Mapping[str, Any], where: Path) -> None:
    if config.get("format") != "metr":
        what = "not a METR checkpoint"
        raise CheckpointError(what, where=where, hint="weights of other detectors have to be converted first")
    version = config.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        what = f"format version {version!r}; this METR reads versions up to {FORMAT_VERSION}"
        raise CheckpointError(what, where=where, hint="update metr")
    kinds = {"model": dict, "text_width": int, "text_encoder": dict, "preprocessing": dict}
    for key, kind in kinds.items():
        if not isinstance(config.get(key), kind):
            what = f"expected {key!r} to be a {kind.__name__}, found {config.get(key)!r}"
            raise CheckpointError(what, where=where, hint="copy the checkpoint again, or take another one")


def _model(values: Mapping[str, Any], where: Path) -> DetectorConfig:
    try:
        return DetectorConfig.checked(values, where=f"{where} (model)")
    except ConfigError as error:
        raise CheckpointError(error.what, where=error.where, hint=error.hint) from None


def _detection(values: Any, vocabulary: Vocabulary, where: Path) -> DetectionDefaults:
    try:
        defaults = DetectionDefaults.checked(values, where=f"{where} (detection)")
    except (ConfigError, TypeError, ValueError) as error:
        what = error.what if isinstance(error, ConfigError) else f"expected keys and values, found {values!r}"
        raise CheckpointError(what, where=f"{where} (detection)", hint="copy the checkpoint again") from None
    named = {*defaults.names, *defaults.calibration, *defaults.thresholds, *defaults.aliases.values()}
    if strangers := sorted(named.difference(vocabulary.names)):
        what = f"detection has names that {VOCABULARY} lacks: {strangers}"
        raise CheckpointError(what, where=where, hint="copy the checkpoint again, or take another one")
    return defaults


def _embeddings(path: Path, rows: int, width: int) -> Tensor:
    tensors = read_tensors(path)
    embeddings = tensors.get(_EMBEDDINGS_KEY)
    if embeddings is None or embeddings.shape != (rows, width):
        found = sorted(tensors) if embeddings is None else list(embeddings.shape)
        what = f"expected {_EMBEDDINGS_KEY!r} of shape {[rows, width]} (names, text width), found {found}"
        raise CheckpointError(what, where=path, hint="copy the checkpoint again, or take another one")
    return embeddings
