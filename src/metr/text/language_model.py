"""Frozen language models of transformers: how they are found and loaded, and how they embed sentences."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import sha256
from inspect import signature
from pathlib import Path
from typing import Any

import msgspec
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize
from transformers.utils.hub import cached_file

from metr.errors import ConfigError, ModelError, did_you_mean
from metr.hub import MINILM, configuration, loading, minilm_folder, pretrained
from metr.text.config import BUNDLED, Pooling

# Text parts of image-text models: the class, and the output with the vector in the space shared with images.
_PROJECTED = {
    "clip": ("CLIPTextModelWithProjection", "text_embeds"),
    "clip_text_model": ("CLIPTextModelWithProjection", "text_embeds"),
    "metaclip_2": ("MetaClip2TextModelWithProjection", "text_embeds"),
    "siglip": ("SiglipTextModel", "pooler_output"),
    "siglip_text_model": ("SiglipTextModel", "pooler_output"),
    "siglip2": ("Siglip2TextModel", "pooler_output"),
    "siglip2_text_model": ("Siglip2TextModel", "pooler_output"),
}
# Models that AutoModel would load with a decoder, which is not needed to embed sentences.
_ENCODERS = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
_MODEL_FILES = (".safetensors", ".bin", ".json", ".txt", ".model")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Sentences a batch; larger batches would not fit the caches of a CPU.
_BATCH = 64
# Longest sentence in tokens, if the model has no limit of its own.
_LONGEST = 512


@dataclass(frozen=True, kw_only=True)
class LanguageModelSource:
    """A language model that was found, but is not loaded.

    Attributes:
        location: A folder or a hub name.
        revision: The hub's commit; None for a folder.
        fingerprint: Identifies the weights: SHA-256 of the files, or the commit.
        pooling: How token vectors become the sentence's.
        width: Numbers of an embedding, t.
    """

    location: str
    revision: str | None
    fingerprint: str
    model_type: str
    pooling: Pooling
    width: int

    @classmethod
    def find(cls, source: str, revision: str | None, pooling: Pooling) -> "LanguageModelSource":
        """The source that a configuration names.

        Args:
            source: `bundled:minilm`, a folder, or a hub name.
            revision: The hub's branch, tag or commit.
            pooling: "auto" takes what the model was trained with.

        Raises:
            ModelError: there is no such model, or the hub is out of reach.
            ConfigError: the pooling does not suit the model.
        """
        if source == BUNDLED:
            return cls._bundled(pooling)
        if source.startswith("bundled:"):
            raise ModelError("no such bundled model", where=source, hint=did_you_mean(source, [BUNDLED]))
        path = Path(source).expanduser()
        if path.is_dir():
            _refuse_pickles(path)
            return cls._read(str(path), None, f"sha256:{_fingerprint(path)}", pooling)
        return cls._read(source, revision, None, pooling)

    @classmethod
    def _bundled(cls, pooling: Pooling) -> "LanguageModelSource":
        """The bundled MiniLM. Its facts are constants, so that its package is needed only to embed new phrases."""
        _check_pooling(pooling, "bert")
        return cls(
            location=BUNDLED,
            revision=None,
            fingerprint=f"sha256:{MINILM.sha256}",
            model_type="bert",
            pooling="mean" if pooling == "auto" else pooling,
            width=384,
        )

    @classmethod
    def _read(
        cls, location: str, revision: str | None, fingerprint: str | None, pooling: Pooling
    ) -> "LanguageModelSource":
        with loading(location):
            config = configuration(location, revision)
        commit = None
        if fingerprint is None:
            commit = revision if revision and _COMMIT.fullmatch(revision) else (config._commit_hash or revision)
            fingerprint = f"commit:{commit or 'unknown'}"
        if hasattr(config, "vision_config") and config.model_type not in _PROJECTED:
            what = f"the text half of a {config.model_type} model is not known here"
            raise ModelError(what, where=location, hint="name a CLIP, SigLIP or BERT-like model")
        return cls(
            location=location,
            revision=commit,
            fingerprint=fingerprint,
            model_type=config.model_type,
            pooling=_pooling(pooling, location, commit, config.model_type),
            width=_width(config),
        )


class LanguageModel:
    """A frozen language model in evaluation mode, in single precision.

    Args:
        source: Where it comes from.
        device: Where it runs.

    Raises:
        ModelError: its files cannot be loaded or do not fit together.
        DependencyError: the bundled model's package is missing or altered.
    """

    def __init__(self, source: LanguageModelSource, device: torch.device | str = "cpu") -> None:
        # A few thousand short phrases need no threads, and the tokenizer's threads do not survive a fork of workers.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.source, self.device = source, torch.device(device)
        origin: dict[str, Any] = {"revision": source.revision or "main"}
        location = str(minilm_folder()) if source.location == BUNDLED else source.location
        with loading(location):
            self._tokenizer = pretrained("AutoTokenizer", location, **origin)
            self._model = pretrained(self._class(), location, dtype=torch.float32, **origin)
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._model.eval().requires_grad_(False).to(self.device)

    def _class(self) -> str:
        name = _PROJECTED[self.source.model_type][0] if self.source.pooling == "projection" else None
        return name or _ENCODERS.get(self.source.model_type, "AutoModel")

    @cached_property
    def _inputs(self) -> set[str]:
        """The tokenizer outputs that the model takes. SigLIP was trained to attend to padding, so it gets no mask."""
        taken = set(signature(self._model.forward).parameters) & {"input_ids", "attention_mask", "token_type_ids"}
        return taken - {"attention_mask"} if self._pads_fully else taken

    @cached_property
    def _longest(self) -> int:
        """The largest number of tokens of a sentence; longer sentences are cut."""
        values = self._model.config.get_text_config().to_dict()
        return min(int(self._tokenizer.model_max_length), int(values.get("max_position_embeddings") or _LONGEST))

    @property
    def _pads_fully(self) -> bool:
        return self.source.model_type.startswith("siglip")

    @torch.no_grad()
    def encode(self, sentences: Sequence[str]) -> Float[Tensor, "n t"]:
        """One L2-normalised vector a sentence, on the CPU. Sentences of similar length share a batch, to pad little."""
        order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
        rows = torch.empty(len(sentences), self.source.width)
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            with loading(self.source.location):  # a tokenizer's file may hold what fails only when it is used
                rows[batch] = self._encode_batch([sentences[i] for i in batch]).float().cpu()
        return normalize(rows, dim=-1)

    def _encode_batch(self, sentences: list[str]) -> Float[Tensor, "n t"]:
        how = {"padding": "max_length" if self._pads_fully else True, "truncation": True, "max_length": self._longest}
        tokens = self._tokenizer(sentences, return_tensors="pt", **how).to(self.device)
        output = self._model(**{key: value for key, value in tokens.items() if key in self._inputs})
        if self.source.pooling == "projection":
            vectors: Tensor = output[_PROJECTED[self.source.model_type][1]]
            return vectors
        states: Tensor = output.last_hidden_state
        if self.source.pooling == "cls":
            return states[:, 0]
        weights: Tensor = tokens["attention_mask"].unsqueeze(-1).to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1)


def _pooling(asked: Pooling, location: str, commit: str | None, model_type: str) -> Pooling:
    """The pooling to use; models of sentence-transformers say in a file what they were trained with."""
    fitting = _check_pooling(asked, model_type)
    if asked != "auto":
        return asked
    if len(fitting) == 1:
        return fitting[0]
    with loading(location):
        file = cached_file(
            location,
            "1_Pooling/config.json",
            revision=commit or "main",
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        stated = {} if file is None else msgspec.json.decode(Path(file).read_bytes(), type=dict[str, Any])
    return "cls" if stated.get("pooling_mode_cls_token") else "mean"


def _check_pooling(asked: Pooling, model_type: str) -> tuple[Pooling, ...]:
    """The poolings that suit a type of model; `asked` must be one of them, or "auto"."""
    fitting: tuple[Pooling, ...] = ("projection",) if model_type in _PROJECTED else ("mean", "cls")
    if asked != "auto" and asked not in fitting:
        what = f"pooling {asked!r} does not suit a {model_type} model"
        raise ConfigError(what, where="pooling", hint=f"auto, or {' or '.join(fitting)}")
    return fitting


def _width(config: Any) -> int:
    """Numbers of a sentence's vector."""
    text = config.get_text_config()
    if config.model_type.startswith("siglip"):
        return int(text.projection_size)
    return int(text.projection_dim if config.model_type in _PROJECTED else text.hidden_size)


def _refuse_pickles(folder: Path) -> None:
    """Checks that a folder's weights are safetensors, not pickles.

    Raises:
        ModelError: they are pickles.
    """
    pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin*"))
    if pickles and not any(folder.glob("*.safetensors")):
        what = f"its weights are a pickle ({pickles[0]}), which METR does not open"
        hint = "load it where you trust it and save it again with save_pretrained, which writes model.safetensors"
        raise ModelError(what, where=folder, hint=hint)


def _fingerprint(folder: Path) -> str:
    """SHA-256 of the files of a model folder, computed once a process for the same files."""
    files = [*folder.iterdir(), *folder.glob("1_Pooling/config.json")]
    models = sorted(path for path in files if path.is_file() and path.suffix in _MODEL_FILES)
    return _digest(folder, tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in models))


@lru_cache(maxsize=8)
def _digest(folder: Path, files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = sha256()
    for path, size, _ in files:
        digest.update(f"{path.relative_to(folder)} {size}\n".encode())
        with path.open("rb") as opened:
            while block := opened.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
