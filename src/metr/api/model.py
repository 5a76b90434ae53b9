"""METR: a network, its vocabulary and its text encoder, as one thing that detects."""

from collections.abc import Sequence
from pathlib import Path
from typing import overload

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from jaxtyping import Float
from torch import Tensor

from metr.data.config import ResizeConfig
from metr.engine.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from metr.engine.weights import load_weights
from metr.errors import CheckpointError
from metr.inference.config import InferenceConfig
from metr.inference.predictor import Picture, Predictor
from metr.models.detector import Detector
from metr.structures import Detections
from metr.text.encoder import TextEncoder, TextEncoderConfig
from metr.text.vocabulary import Vocabulary

# files that a checkpoint on the hub may consist of; nothing else is fetched
_FILES = ["config.json", "*.safetensors", "vocabulary.json", "README.md"]


class METR:
    """A detector that finds what it is asked for by name.

    Made by `from_pretrained` from a checkpoint folder, a run folder or a name on the hub.

    Attributes:
        network: The `Detector`, in evaluation mode.
        vocabulary: The names it was trained on, and which dataset annotates which.
        checkpoint: All else that the folder held (its weights excepted).
    """

    def __init__(self, network: Detector, checkpoint: Checkpoint, where: object = None) -> None:
        self.network, self.checkpoint = network.eval(), checkpoint
        self.vocabulary = checkpoint.vocabulary
        where = where or "checkpoint"
        self.resize = ResizeConfig.checked(checkpoint.preprocessing, where=f"{where} (preprocessing)")
        described = dict(checkpoint.text_encoder)
        self._encoder_identity = described.pop("identity", None)
        self._encoder_config = TextEncoderConfig.checked(described, where=f"{where} (text_encoder)")
        self._encoder: TextEncoder | None = None

    @classmethod
    def from_pretrained(cls, source: str | Path, *, device: str | torch.device = "cpu") -> "METR":
        """Loads a detector; no flags are needed, nothing is unpickled, and a folder needs no network.

        Args:
            source: A checkpoint folder, a run folder (its best checkpoint), or a name on the hub ("user/name").
            device: Where the network goes.

        Raises:
            CheckpointError: there is no such checkpoint, or it is damaged.
        """
        folder = Path(source)
        if not folder.exists() and _may_be_a_hub_name(str(source)):
            folder = _fetched(str(source))
        checkpoint = load_checkpoint(folder)
        config = checkpoint.model
        # the weights come from the checkpoint, so the backbone's own need not be fetched
        bare = config.model_copy(update={"backbone": config.backbone.model_copy(update={"pretrained": False})})
        network = Detector(bare, checkpoint.text_width)
        load_weights(network, checkpoint.weights, where=folder)
        return cls(network.to(device), checkpoint, folder)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Writes a checkpoint folder that `from_pretrained` reads.

        Args:
            folder: Where to.
            dtype: Of the weights on disk, such as `torch.float16`.
        """
        values = {name: getattr(self.checkpoint, name) for name in _FIELDS}
        save_checkpoint(Path(folder), Checkpoint(**values, weights=self.network.state_dict()), dtype=dtype)

    @property
    def names(self) -> tuple[str, ...]:
        """The names that it was trained on."""
        return self.vocabulary.names

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    def embed(self, names: Sequence[str]) -> Float[Tensor, "v t"]:
        """Text embeddings of any names; those of training come from the checkpoint, the others from its text encoder.

        Raises:
            ConfigError: a name is empty or given twice.
            ModelError: a name is new and the text encoder cannot be loaded.
        """
        wanted = Vocabulary.of(names)
        known = set(self.vocabulary.names)
        fresh = [name for name in wanted.names if name not in known]
        rows = dict(zip(fresh, self._text_encoder().embed(fresh), strict=True)) if fresh else {}
        for name in wanted.names:
            if name in known:
                rows[name] = self.checkpoint.text_embeddings[self.vocabulary.index_of(name)]
        return torch.stack([rows[name] for name in wanted.names])

    def predictor(self, names: Sequence[str] | None = None, config: InferenceConfig | None = None) -> Predictor:
        """A predictor for these names (by default all of training), for many pictures or settings of one's own."""
        wanted = self.vocabulary.names if names is None else Vocabulary.of(names).names
        return Predictor(self.network, self.embed(wanted), wanted, self.resize, config)

    @overload
    def detect(
        self, pictures: Picture, names: Sequence[str] | None = None, *, threshold: float = 0.3
    ) -> Detections: ...

    @overload
    def detect(
        self, pictures: list[Picture], names: Sequence[str] | None = None, *, threshold: float = 0.3
    ) -> list[Detections]: ...

    def detect(
        self, pictures: Picture | list[Picture], names: Sequence[str] | None = None, *, threshold: float = 0.3
    ) -> Detections | list[Detections]:
        """Finds objects.

        Args:
            pictures: A path, an RGB array [h w 3] of bytes or a PIL image; or a list of such.
            names: What to look for; by default everything that it was trained on.
            threshold: The least score, 0..1.

        Returns:
            The detections of the picture, best first; a list of them for a list of pictures.

        Raises:
            DataError: a picture is missing or unreadable.
        """
        config = InferenceConfig()
        post = config.postprocess.model_copy(update={"score_threshold": threshold})
        predictor = self.predictor(names, config.model_copy(update={"postprocess": post}))
        if not isinstance(pictures, list):
            return predictor.detect(pictures)
        return [predictor.detect(picture) for picture in pictures]

    def _text_encoder(self) -> TextEncoder:
        """The text encoder of training, loaded when a name first needs it.

        Raises:
            CheckpointError: it is another model than that of training.
        """
        if self._encoder is None:
            encoder = TextEncoder(self._encoder_config)
            if encoder.identity != self._encoder_identity or encoder.width != self.checkpoint.text_width:
                what = f"not the text encoder of training: expected {self._encoder_identity}, found {encoder.identity}"
                hint = "put that of training back in its place; names of training need no text encoder"
                raise CheckpointError(what, where=self._encoder_config.source, hint=hint)
            self._encoder = encoder
        return self._encoder


_FIELDS = ("model", "vocabulary", "text_embeddings", "text_encoder", "preprocessing", "training")


def _may_be_a_hub_name(source: str) -> bool:
    """user/name: one slash, and no path of this machine."""
    return source.count("/") == 1 and not source.startswith((".", "/", "~"))


def _fetched(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        what = f"neither a folder here nor a model that the hub gave ({type(error).__name__})"
        raise CheckpointError(what, where=name, hint="check the path or the name, and the connection") from None
