"""Category names to text embeddings, by a frozen language model that is loaded only when it is needed."""

import re
from collections.abc import Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from metr.text.cache import EmbeddingCache
from metr.text.config import TEMPLATES, TextEncoderConfig
from metr.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from metr.text.language_model import LanguageModel

_SEPARATORS = re.compile(r"(?<=\w)[_-]+(?=\w)|_")
_SLOT = re.compile(r"(\ban? )?\{\}")
_DETERMINERS = frozenset({"a", "an", "the", "some", "one", "my", "your", "his", "her", "its", "their", "our"})
# Letters whose names begin with a vowel sound: an RBC, but a WBC.
_SPOKEN_VOWELS = "AEFHILMNORSX"
_SPELT_OUT = re.compile(r"[A-Z]([B-DF-HJ-NP-TV-Z]{1,3})?$")
_SILENT_H = re.compile(r"hour|honest|honou?r|heir", re.IGNORECASE)
_SPOKEN_CONSONANT = re.compile(r"uni([^mn]|$)|us[eu]|uk|ut[ei]|ur[aio]|eu|ewe|one|once", re.IGNORECASE)
# Part of the identity. Raise it when a change of code gives other embeddings for the same model and templates.
_SCHEME = 1
# Phrases that are embedded at once: the sentences of 20,000 took half a gigabyte.
_AT_ONCE = 2048


class TextEncoder:
    """Embeds vocabularies. The language model is loaded only if the cache lacks a phrase.

    Args:
        config: Which language model and templates.
        cache_root: The folder of cached embeddings; by default `~/.cache/metr/text`, or `text` under `METR_CACHE`.
        device: The language model's device; embeddings are always on the CPU.
        keep: Whether what is embedded goes into the cache, which is never emptied.

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
        keep: bool = True,
    ) -> None:
        from metr.text.language_model import LanguageModelSource  # transformers takes seconds to import

        self.config = config or TextEncoderConfig()
        self.source = LanguageModelSource.find(self.config.source, self.config.revision, self.config.pooling)
        self.device, self.keep = device, keep
        self._cache = EmbeddingCache(self.identity, cache_root)
        self._model: "LanguageModel | None" = None

    @cached_property
    def identity(self) -> str:
        """Names everything that the embeddings depend on except the names: weights, pooling and templates."""
        templates = sha256("\n".join(self.config.templates).encode()).hexdigest()[:16]
        found = self.source
        return f"{found.model_type} {found.fingerprint} {found.pooling} templates:{templates} scheme:{_SCHEME}"

    @property
    def width(self) -> int:
        """Numbers of an embedding, t."""
        return self.source.width

    @property
    def pinned_config(self) -> TextEncoderConfig:
        """The configuration with the hub's commit, so that the same weights are found later."""
        return self.config.model_copy(update={"revision": self.source.revision or self.config.revision})

    def embed(self, vocabulary: Vocabulary | Sequence[str]) -> Float[Tensor, "v t"]:
        """One L2-normalised row a name: the mean over the templates of the normalised sentences, on the CPU.

        Raises:
            ModelError: a name is new and the language model cannot be loaded.
            DependencyError: a name is new and the bundled model's package is missing or altered.
            ConfigError: names were given instead of a vocabulary, and one is empty or given twice.
        """
        if not isinstance(vocabulary, Vocabulary):
            vocabulary = Vocabulary.of(vocabulary)
        phrases = [phrase_of(name, vocabulary.prompts.get(name)) for name in vocabulary.names]
        known = self._cache.get(phrases)
        missing = list(dict.fromkeys(phrase for phrase in phrases if phrase not in known))
        for start in range(0, len(missing), _AT_ONCE):
            some = missing[start : start + _AT_ONCE]
            known |= dict(zip(some, self._embed_phrases(some), strict=True))
            if self.keep and len(missing) > _AT_ONCE:  # takes minutes: what is done is kept
                self._cache.put(some, torch.stack([known[phrase] for phrase in some]))
        vectors = torch.stack([known[phrase] for phrase in phrases])
        if self.keep and 0 < len(missing) <= _AT_ONCE:
            self._cache.put(phrases, vectors)
        return vectors

    def release(self) -> None:
        """Frees the language model's memory. It is loaded again if needed."""
        self._model = None

    def _embed_phrases(self, phrases: Sequence[str]) -> Float[Tensor, "n t"]:
        if self._model is None:
            from metr.text.language_model import LanguageModel

            self._model = LanguageModel(self.source, self.device)
        sentences = [sentence for phrase in phrases for sentence in filled(phrase, self.config.templates)]
        vectors = self._model.encode(sentences)
        return normalize(reduce(vectors, "(n s) t -> n t", "mean", n=len(phrases)), dim=-1)


def phrases(name: str, prompt: str | None = None, templates: Sequence[str] = TEMPLATES) -> tuple[str, ...]:
    """The sentences for a category: its phrase put into each template.

    Args:
        name: The category's name.
        prompt: The phrase to use instead of the name.
        templates: Each contains `{}` once. In `a {}` the article is adapted to the phrase, or left out.
    """
    return filled(phrase_of(name, prompt), templates)


def phrase_of(name: str, prompt: str | None = None) -> str:
    """The phrase of a category: its prompt as written, or its name with `_` and `-` read as spaces."""
    if prompt is not None:
        return prompt
    return " ".join(_SEPARATORS.sub(" ", name).split()) or name


def filled(phrase: str, templates: Sequence[str]) -> tuple[str, ...]:
    """The phrase put into each template."""
    determined = _with_article(phrase)
    return tuple(_SLOT.sub(lambda slot: determined if slot[1] else phrase, template) for template in templates)


def _with_article(phrase: str) -> str:
    first = phrase.split(maxsplit=1)[0]
    if first.lower() in _DETERMINERS:
        return phrase
    return f"{'an' if _begins_with_vowel_sound(first) else 'a'} {phrase}"


def _begins_with_vowel_sound(word: str) -> bool:
    if _SPELT_OUT.match(word):
        return word[0] in _SPOKEN_VOWELS
    if _SILENT_H.match(word):
        return True
    return word[0].lower() in "aeiou" and not _SPOKEN_CONSONANT.match(word)
