"""Names of categories into text embeddings, by a frozen language model that is loaded only when it is needed."""

from collections.abc import Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import torch
from einops import reduce
from jaxtyping import Float
from pydantic import field_validator
from torch import Tensor
from torch.nn.functional import normalize

from metr.config import Config
from metr.text.cache import EmbeddingCache
from metr.text.language_model import BUNDLED, LanguageModel, LanguageModelSource, Pooling
from metr.text.templates import TEMPLATES, filled, phrase_of
from metr.text.vocabulary import Vocabulary

# Goes into the identity: to be raised when the same model and templates come to give other embeddings.
_SCHEME = 1


class TextEncoderConfig(Config):
    """Which language model, and in which sentences it reads a name."""

    source: str = BUNDLED
    """`bundled:minilm`, a folder as save_pretrained writes it, or a hub name such as openai/clip-vit-base-patch32."""
    revision: str | None = None
    """The hub's branch, tag or commit."""
    pooling: Pooling = "auto"
    """From tokens to a sentence: "auto" takes what the model was made for."""
    templates: tuple[str, ...] = TEMPLATES
    """Sentences with `{}` for the name; an embedding is the mean over them."""

    @field_validator("templates")
    @classmethod
    def _one_place_each(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        if not templates or any(template.count("{}") != 1 for template in templates):
            raise ValueError("expected one or more sentences that hold {} once")
        return templates


class TextEncoder:
    """Embeds vocabularies. The language model stays unloaded while the cache knows every phrase.

    Args:
        config: Which language model and templates.
        cache_root: Where embeddings are kept; by default `~/.cache/metr/text`, or `text` under `METR_CACHE`.
        device: Where the language model runs; embeddings are always on the CPU.

    Raises:
        ModelError: there is no such model, or the hub is out of reach.
        ConfigError: the pooling does not suit the model.
    """

    def __init__(
        self,
        config: TextEncoderConfig | None = None,
        *,
        cache_root: Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config or TextEncoderConfig()
        self.source = LanguageModelSource.find(self.config.source, self.config.revision, self.config.pooling)
        self.device = device
        self._cache = EmbeddingCache(self.identity, cache_root)
        self._model: LanguageModel | None = None

    @cached_property
    def identity(self) -> str:
        """All that the embeddings depend on but the names: weights, pooling and templates."""
        templates = sha256("\n".join(self.config.templates).encode()).hexdigest()[:16]
        found = self.source
        return f"{found.model_type} {found.fingerprint} {found.pooling} templates:{templates} scheme:{_SCHEME}"

    @property
    def width(self) -> int:
        """Numbers of an embedding, t."""
        return self.source.width

    @property
    def pinned_config(self) -> TextEncoderConfig:
        """The configuration with the hub's commit in it, so that later the same weights are found."""
        return self.config.model_copy(update={"revision": self.source.revision or self.config.revision})

    def embed(self, vocabulary: Vocabulary | Sequence[str]) -> Float[Tensor, "v t"]:
        """One L2-normalised row a name: the mean over the templates of the normalised sentences, on the CPU.

        Raises:
            ModelError: the language model is needed and cannot be loaded.
            DependencyError: the bundled one is needed, and its package is missing or altered.
            ConfigError: names were given instead of a vocabulary, and one is empty or given twice.
        """
        if not isinstance(vocabulary, Vocabulary):
            vocabulary = Vocabulary.of(vocabulary)
        phrases = [phrase_of(name, vocabulary.prompts.get(name)) for name in vocabulary.names]
        known = self._cache.get(phrases)
        missing = list(dict.fromkeys(phrase for phrase in phrases if phrase not in known))
        if missing:
            fresh = self._embed_phrases(missing)
            self._cache.put(missing, fresh)
            known |= dict(zip(missing, fresh, strict=True))
        return torch.stack([known[phrase] for phrase in phrases])

    def release(self) -> None:
        """Frees the language model's memory; it is loaded again when it is needed."""
        self._model = None

    def _embed_phrases(self, phrases: Sequence[str]) -> Float[Tensor, "n t"]:
        if self._model is None:
            self._model = LanguageModel(self.source, self.device)
        sentences = [sentence for phrase in phrases for sentence in filled(phrase, self.config.templates)]
        vectors = self._model.encode(sentences)
        return normalize(reduce(vectors, "(n s) t -> n t", "mean", n=len(phrases)), dim=-1)
