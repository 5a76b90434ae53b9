"""METR: a network, its vocabulary and its text encoder, as one thing that detects."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch
from jaxtyping import Float
from torch import Tensor

from metr.checkpoint import Checkpoint, find_checkpoint, found_nothing, load_checkpoint, save_checkpoint, words_of
from metr.data.config import ResizeConfig
from metr.data.images import ImageSource
from metr.devices import resolved_device
from metr.errors import CheckpointError, ConfigError, DataError
from metr.inference.calibrated_names import with_names_in_their_case
from metr.inference.config import InferenceConfig, suited
from metr.inference.postprocess import ScoreThresholds
from metr.inference.predictor import Prediction, Predictor
from metr.inference.selection import name_limits
from metr.models.detector import Detector, skeleton, unfilled
from metr.serialization import check_weights, load_weights, type_of
from metr.sources import DetectorSource, find_source
from metr.structures import Detections
from metr.text.config import TextEncoderConfig
from metr.text.encoder import TextEncoder
from metr.text.same_names import Untrained, asked_names, in_another_case, told, untrained
from metr.text.vocabulary import Vocabulary, listed_names

__all__ = ["METR", "Names"]

Names = Sequence[str] | Mapping[str, Sequence[str]]
"""What to look for: names, or names with several phrases that describe each."""

_logger = logging.getLogger(__name__)


class METR:
    """A detector that finds what it is asked for by name.

    `from_pretrained` loads one from a checkpoint folder, a run folder or a name on the hub. `save_pretrained` writes
    the checkpoint alone; `metr.save` writes a model card beside it, and `metr.push` sends both to the hub.

    Attributes:
        network: The `Detector`, in evaluation mode.
        vocabulary: The names it was trained on, and which dataset annotates which.
        checkpoint: All else that the folder held; the weights are the network's.
        resize: The shape in which images enter the network: that of its training.
        stored_as: The type of the weights on disk ("float16"); None where there were none, or several types.
        folder: The checkpoint folder that it was loaded from; None where it was made in another way.
        source: Where it, or the detector that it was made of, was found; None where it was made in another way.
        keeps: Whether new names are logged and their embeddings cached; else nothing grows, whatever it is asked for.
    """

    def __init__(self, network: Detector, checkpoint: Checkpoint, where: object = None) -> None:
        self.network, self.checkpoint = network.eval(), replace(checkpoint, weights={})
        self.stored_as = type_of(checkpoint.weights)
        self.vocabulary = checkpoint.vocabulary
        where = where or "checkpoint"
        described = dict(checkpoint.text_encoder)
        self._encoder_identity = described.pop("identity", None)
        with _checkpoint_errors():
            self.resize = ResizeConfig.checked(checkpoint.preprocessing, where=f"{where} (preprocessing)")
            self._encoder_config = TextEncoderConfig.checked(described, where=f"{where} (text_encoder)")
        self.folder: Path | None = None
        self.source: DetectorSource | None = None
        self.keeps = True
        self._encoder: TextEncoder | None = None
        self._told: set[str] = set()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: str | torch.device = "auto",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> "METR":
        """Loads a detector. Nothing is unpickled, no code that comes with it is run, and a folder needs no internet.

        A detector of transformers or of DINO becomes a METR with its names, as `metr.from_detector` makes it.

        Args:
            source: A checkpoint folder, a run folder (its best checkpoint), a folder of transformers, a `.pth` file of
                DINO, or a name on the hub ("user/name", "user/name@revision").
            device: Where the network goes; "auto" is an accelerator where there is one, else the CPU.
            revision: The branch, tag or commit of a repository on the hub; by default the newest of `main`.
            token: The hub's; by default that of `hf auth login` or HF_TOKEN, False for none.
            cache_dir: Where downloads are kept; by default in huggingface-hub's own cache.
            local_files_only: Ask the hub for nothing: take what was downloaded before.
            force_download: Download again what is here already.

        Raises:
            CheckpointError: there is no such detector, it is damaged, or the hub does not give it.
            ConfigError: there is no such device, or the detector does not say what it finds.
            ModelError: METR has no counterpart of the detector.
        """
        place = resolved_device(device)
        found = find_source(
            source,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        with found.in_its_name():
            return _of_another(found, place) if found.kind != "metr" else cls._loaded(found, place)

    @classmethod
    def _loaded(cls, found: DetectorSource, place: torch.device) -> "METR":
        """A METR from its own checkpoint."""
        folder = found.fetched()
        checkpoint = load_checkpoint(folder)
        hint = "config.json and model.safetensors are not of one checkpoint: copy the folder again"
        # before memory is taken for a network that the weights do not fit
        check_weights(skeleton(checkpoint.model, checkpoint.text_width), checkpoint.weights, where=folder, hint=hint)
        network = unfilled(checkpoint.model, checkpoint.text_width)
        load_weights(network, checkpoint.weights, where=folder, hint=hint)
        model = cls(network.to(place), checkpoint, folder)
        model.folder, model.source = find_checkpoint(folder), found
        return model

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Writes a checkpoint folder that `from_pretrained` reads: whole, or not at all.

        It holds no model card: `metr.save` writes one. A README.md that a person wrote there stays as it is.

        Args:
            folder: Made if it is missing, replaced if it holds a checkpoint.
            dtype: The type of the weights on disk, such as `torch.float16`; by default the network's.

        Raises:
            CheckpointError: the folder holds something else, or the disk refuses.
        """
        save_checkpoint(Path(folder), self.with_weights(), dtype=dtype)

    def with_weights(self) -> Checkpoint:
        """The checkpoint with the network's weights as they are now."""
        return replace(self.checkpoint, weights=self.network.state_dict())

    @property
    def names(self) -> tuple[str, ...]:
        """The names that it was trained on."""
        return self.vocabulary.names

    @property
    def default_names(self) -> tuple[str, ...]:
        """The names that it looks for unless others are given: those of its fine-tuning, else all of training."""
        return self.checkpoint.detection.names or self.vocabulary.names

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    def embed(self, names: Names | Vocabulary, *, tell: bool = True) -> Float[Tensor, "v t"]:
        """Text embeddings of any names: of training's names from the checkpoint, of others from the text encoder.

        A name or a prompt that was not trained is logged as a warning, once, with the nearest trained names.

        Args:
            names: Plain names; or a mapping from names to the phrases that describe each, whose mean is taken; or a
                vocabulary, whose prompts are embedded in place of the names that have one.
            tell: Whether names that were not trained are logged.

        Raises:
            ConfigError: a name is no text, empty or given twice, or has no phrase.
            ModelError: a name is new and the text encoder cannot be loaded.
        """
        if isinstance(names, Mapping):
            return self._embed_phrases(names)
        return self._embed(names if isinstance(names, Vocabulary) else Vocabulary.of(names), tell)

    def _embed(self, wanted: Vocabulary, tell: bool = True, meant: Mapping[str, str] | None = None) -> Tensor:
        """The same. `meant`: the trained names that others mean; by default the checkpoint's aliases."""
        aliases, tell = self.checkpoint.detection.aliases if meant is None else meant, tell and self.keeps
        trained = {name: self._trained_name(name, wanted.prompts.get(name), aliases) for name in wanted.names}
        for name, own in trained.items() if tell else ():
            if own not in {None, name}:
                self._log_once(logging.INFO, f'"{name}" is taken as "{own}"')
        fresh = _only(wanted, [name for name, own in trained.items() if own is None])
        rows = {
            name: self.checkpoint.text_embeddings[self.vocabulary.index_of(own)]
            for name, own in trained.items()
            if own is not None
        }
        if fresh is not None:
            text = self._text_encoder().embed(fresh)
            rows |= dict(zip(fresh.names, text, strict=True))
            if tell:
                self._warn(self._untrained(fresh, text))
        return torch.stack([rows[name] for name in wanted.names])

    def untrained(self, names: Vocabulary) -> tuple[Untrained, ...]:
        """The names of a vocabulary that were not trained, or not by their prompt, with the nearest trained names.

        Raises:
            ConfigError: it is no vocabulary.
            ModelError: there are such names and the text encoder cannot be loaded.
        """
        if not isinstance(names, Vocabulary):
            raise ConfigError(f"expected a Vocabulary, found {names!r}", where="names", hint="Vocabulary.of(names)")
        aliases, prompts = self.checkpoint.detection.aliases, names.prompts
        unknown = [name for name in names.names if self._trained_name(name, prompts.get(name), aliases) is None]
        fresh = _only(names, unknown)
        if fresh is None:
            return ()
        return self._untrained(fresh, self._text_encoder().embed(fresh))

    def _untrained(self, fresh: Vocabulary, text: Float[Tensor, "n t"]) -> tuple[Untrained, ...]:
        words = words_of(self.checkpoint.training)
        return untrained(fresh, text, self.names, self.checkpoint.text_embeddings, words)

    def _trained_name(self, name: str, prompt: str | None, aliases: Mapping[str, str]) -> str | None:
        """The trained name that a name means, if training embedded it by the same prompt; else None."""
        own = name if name in self.vocabulary else aliases.get(name)
        return own if own is not None and prompt in {None, self.vocabulary.prompts.get(own)} else None

    def meant(self, names: Sequence[str]) -> dict[str, str]:
        """The trained names that others of these mean: their aliases, and the same in another case, if it is one."""
        return in_another_case(listed_names(names), self.names) | self.checkpoint.detection.aliases

    def _warn(self, found: Sequence[Untrained]) -> None:
        """Logs names that were not trained, each once."""
        if fresh := [one for one in found if one.called not in self._told]:
            self._told |= {one.called for one in fresh}
            _logger.warning("%s", told(fresh))

    def _warn_of_a_start(self) -> None:
        """Logs, once, that no image was seen with the names, where the weights came from another detector alone."""
        training = self.checkpoint.training
        # whose presence nothing taught but that detects, it took the class heads over too
        detects = not self.checkpoint.detection.presence
        if "started from" in training and "step" not in training and not detects:
            what = f"no detector yet: it has weights of {training['started from']} and saw no image"
            self._log_once(logging.WARNING, f"a start for training, {what}; metr finetune trains it")

    def _warn_of_nothing_found(self) -> None:
        """Logs, once, that the newest evaluation of training found nothing."""
        training = self.checkpoint.training
        metrics = training.get("metrics")
        if isinstance(metrics, Mapping) and found_nothing(metrics):
            what = f"AP was 0 on val after step {training.get('step', '?')} of its training"
            self._log_once(logging.WARNING, f"this detector has learnt next to nothing: {what}; train it for longer")

    def _log_once(self, level: int, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            _logger.log(level, "%s", message)

    def _embed_phrases(self, phrases: Mapping[str, Sequence[str]]) -> Float[Tensor, "v t"]:
        """For each name the normalised mean of the embeddings of its phrases; trained names may be phrases."""
        for name, some in phrases.items():
            if isinstance(some, str) or not hasattr(some, "__iter__") or not some:
                what = f"expected a list of phrases for {name!r}, found {some!r}"
                raise ConfigError(what, where="categories", hint=f"{name}: [{some or name}]")
        flat = list(dict.fromkeys(phrase for some in phrases.values() for phrase in some))
        rows = dict(zip(flat, self.embed(flat), strict=True))
        means = [torch.stack([rows[phrase] for phrase in some]).mean(0) for some in phrases.values()]
        return torch.nn.functional.normalize(torch.stack(means), dim=-1)

    def inference(self, config: InferenceConfig | None = None, names: Sequence[str] = ()) -> InferenceConfig:
        """A configuration of detection as it suits these weights, and these names beside the trained ones."""
        config = with_names_in_their_case(config or InferenceConfig(), names, self.names, self.meant(names))
        kept = self.checkpoint.detection
        return suited(config, kept.presence, self._stored(kept.calibration, names))

    def _stored(self, kept: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """What is kept with trained names, and with those of `names` that mean one of them."""
        return {alias: kept[name] for alias, name in self.meant(names).items() if name in kept} | dict(kept)

    def predictor(self, names: Names | Vocabulary | None = None, config: InferenceConfig | None = None) -> Predictor:
        """A predictor for these names (by default `default_names`), for many images or settings of one's own.

        It gives every detection, weak ones included: as evaluations do, unless `config` says otherwise. The names of
        a vocabulary are taken as they are, without prompts: they may differ in capital letters alone.

        Raises:
            ConfigError: a name is no text, empty, or given twice.
        """
        self._warn_of_a_start()
        self._warn_of_nothing_found()
        wanted = self.default_names if names is None else self._asked(names)
        config, meant = self.inference(config, wanted), self.meant(wanted)
        text = self.embed(names) if isinstance(names, Mapping) else self._embed(Vocabulary.of(wanted), meant=meant)
        trained = [meant.get(name, name) for name in wanted]  # an alias has the limits of the name that it stands for
        limits = name_limits(trained, self.vocabulary, self.checkpoint.model, config.selection)
        return Predictor(self.network, text, wanted, self.resize, config, limits=limits)

    def _asked(self, names: Names | Vocabulary) -> tuple[str, ...]:
        return (names if isinstance(names, Vocabulary) else asked_names(names, self.names)).names

    def thresholds(self, threshold: float | None = None, names: Names | None = None) -> ScoreThresholds:
        """The scores from which detections are shown: those kept with names, 0.3 for others, or `threshold` for all.

        Args:
            threshold: The score for all names.
            names: What is looked for, as `predictor` takes it.

        Raises:
            ConfigError: the threshold is not in 0..1, or a name is wrong.
        """
        if threshold is None:
            wanted = () if names is None else self._asked(names)
            return ScoreThresholds(names=self._stored(self.checkpoint.detection.thresholds, wanted))
        return ScoreThresholds.checked({"default": threshold}, where="threshold")

    @overload
    def detect(
        self, images: ImageSource, names: Names | None = None, *, threshold: float | None = None
    ) -> Detections: ...

    @overload
    def detect(
        self, images: list[ImageSource], names: Names | None = None, *, threshold: float | None = None
    ) -> list[Detections]: ...

    def detect(
        self, images: ImageSource | list[ImageSource], names: Names | None = None, *, threshold: float | None = None
    ) -> Detections | list[Detections]:
        """Finds objects: those whose score reaches the threshold, one name for each place.

        Of boxes that overlap by more than 0.7 IoU the best one stays. `predictor` gives all, whatever their score.

        Args:
            images: A path, an RGB array [h w 3] of bytes or a PIL image; or a list of such.
            names: What to look for; by default `default_names`. `model.names` are all that it was trained on.
            threshold: The least score, 0..1; by default that of `thresholds`. A score is the probability of being
                right, for the names that have been evaluated (`metr evaluate --store`, and while training).

        Returns:
            The detections of the image, best first; a list of them for a list of images.

        Raises:
            DataError: an image is missing or unreadable.
            ConfigError: a name is no text, empty or given twice (capital letters make no other one, unless both were
                trained), or the threshold is not in 0..1.
        """
        thresholds, predictor = self.thresholds(threshold, names), self.predictor(names)
        if not isinstance(images, list):
            return thresholds.shown(predictor.detect(images))
        return [thresholds.shown(_found(prediction)) for prediction in predictor.detect_many(images)]

    def _text_encoder(self) -> TextEncoder:
        """The text encoder of training, loaded when a name first needs it.

        Raises:
            CheckpointError: it is another model than that of training.
        """
        if self._encoder is None:
            encoder = TextEncoder(self._encoder_config, keep=self.keeps)
            expected = self._encoder_identity or encoder.identity
            if encoder.identity != expected or encoder.width != self.checkpoint.text_width:
                what = f"not the text encoder of training: expected {expected}, found {encoder.identity}"
                hint = "put that of training back in its place; names of training need no text encoder"
                raise CheckpointError(what, where=self._encoder_config.source, hint=hint)
            self._encoder = encoder
        return self._encoder


def _of_another(found: DetectorSource, place: torch.device) -> METR:
    """A METR with the weights of another detector. What makes it is imported for this alone."""
    import metr

    return metr.from_detector(found, device=place)


@contextmanager
def _checkpoint_errors() -> Iterator[None]:
    """Turns errors in a configuration inside a checkpoint into errors of the checkpoint."""
    try:
        yield
    except ConfigError as error:
        hint = error.hint or "copy the checkpoint again, or update metr"
        raise CheckpointError(error.what, where=error.where, hint=hint) from None


def _only(wanted: Vocabulary, names: Sequence[str]) -> Vocabulary | None:
    """Some names of a vocabulary, with their prompts; None where there are none."""
    prompts = {name: wanted.prompts[name] for name in names if name in wanted.prompts}
    return Vocabulary.of(names, prompts) if names else None


def _found(prediction: Prediction) -> Detections:
    """The detections of an image.

    Raises:
        DataError: it could not be read.
    """
    if prediction.detections is None:
        raise DataError(prediction.issue.detail if prediction.issue else "no answer", where=prediction.source)
    return prediction.detections
