"""Embeddings on disk, so that the language model need not be loaded for phrases it has seen.

An entry is found by the SHA-256 of the encoder's identity and the phrase: nothing is ever out of date, and encoders
share a folder's root without meeting. Entries are kept in segments, one file for all phrases that were embedded
together: thousands of names are one file to write and one to read (384 numbers for 10,000 names are 15 MB), where
a file a name would be thousands of each. A segment is never changed: it is written beside its place, then moved there
under the SHA-256 of its bytes. So processes need no lock (those that embed the same names write the same file), and a
damaged file gives itself away and is embedded again. Many small segments are joined into one.
"""

import logging
import os
import tempfile
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

_log = logging.getLogger(__name__)
_SUFFIX = ".safetensors"
# How many segments there may be before they are joined.
_MOST_SEGMENTS = 32


def cache_root() -> Path:
    """The folder of everything that METR keeps to save time: `METR_CACHE`, or `~/.cache/metr`."""
    try:
        return Path(os.environ.get("METR_CACHE") or "~/.cache/metr").expanduser()
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir()) / "metr"


class EmbeddingCache:
    """The embeddings of one encoder, in memory and on disk.

    A folder that cannot be read or written costs time only: one warning is logged, and the cache works in memory.

    Args:
        identity: Names the encoder with all that its embeddings depend on.
        root: Where the encoders' folders lie; by default `cache_root() / "text"`.
    """

    def __init__(self, identity: str, root: Path | None = None) -> None:
        self.identity = identity
        digest = sha256(identity.encode()).hexdigest()
        self.folder = (cache_root() / "text" if root is None else root) / digest[:24]
        self._entries: dict[bytes, Tensor] = {}
        self._seen: set[Path] = set()
        self._warned = False

    def get(self, phrases: Sequence[str]) -> dict[str, Float[Tensor, "t"]]:
        """The embeddings of those phrases that are known."""
        if any(self._key(phrase) not in self._entries for phrase in phrases):
            self._read_segments()
        found = {phrase: self._entries.get(self._key(phrase)) for phrase in phrases}
        return {phrase: vector for phrase, vector in found.items() if vector is not None}

    def put(self, phrases: Sequence[str], vectors: Float[Tensor, "n t"]) -> None:
        """Keeps the embedding of each phrase."""
        fresh = {self._key(phrase): vector for phrase, vector in zip(phrases, vectors.cpu().float(), strict=True)}
        self._entries.update(fresh)
        try:
            self._write_segment(fresh)
            if len(self._seen) > _MOST_SEGMENTS:
                self._join_segments()
        except OSError as error:
            self._warn(error)

    def _key(self, phrase: str) -> bytes:
        return sha256(f"{self.identity}\n{phrase}".encode()).digest()

    def _read_segments(self) -> None:
        """Reads the segments that are new since the last time."""
        try:
            paths = sorted(self.folder.glob(f"*{_SUFFIX}"))
        except OSError as error:
            self._warn(error)
            return
        for path in paths:
            if path not in self._seen:
                self._entries.update(_segment(path))
                self._seen.add(path)

    def _write_segment(self, entries: dict[bytes, Tensor]) -> Path:
        keys = torch.tensor([list(key) for key in entries], dtype=torch.uint8)
        data = save({"keys": keys, "vectors": torch.stack(list(entries.values()))})
        path = self.folder / f"{sha256(data).hexdigest()}{_SUFFIX}"
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.folder, suffix=".part")
        part = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            part.replace(path)
        except OSError:
            part.unlink(missing_ok=True)
            raise
        self._seen.add(path)
        return path

    def _join_segments(self) -> None:
        """Puts all that was read into one segment; whoever lists the folder meanwhile loses nothing but time."""
        old = self._seen.copy()
        joined = self._write_segment(self._entries)
        for path in old - {joined}:
            path.unlink(missing_ok=True)
        self._seen = {joined}

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            _log.warning("text embeddings are not kept on disk: %s (set METR_CACHE to a writable folder)", error)
        self._warned = True


def _segment(path: Path) -> dict[bytes, Tensor]:
    """The entries of a segment; none if it is damaged or gone."""
    try:
        data = path.read_bytes()
        if sha256(data).hexdigest() != path.stem:
            return {}
        tensors = load(data)
        keys, vectors = tensors["keys"], tensors["vectors"]
    except (OSError, SafetensorError, KeyError):
        return {}
    return dict(zip((bytes(key) for key in keys.tolist()), vectors, strict=True))
