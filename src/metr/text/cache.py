"""Text embeddings on disk, so that names which were embedded before need no language model.

Every encoder has a folder, and every vocabulary that it embedded is one safetensors file there: the vectors, and in the
metadata the phrases and a checksum of the vectors. A phrase is found in whichever file it is. Files are written beside
their place and then moved there, so readers need no lock; a damaged file is not used, and written anew.
"""

import json
import logging
import os
import secrets
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from hashlib import sha256
from pathlib import Path

from filelock import FileLock
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

_PART = ".part"
_logger = logging.getLogger(__name__)


def cache_root() -> Path:
    """The folder of everything that METR keeps to save time: `METR_CACHE`, or `~/.cache/metr`."""
    try:
        return Path(os.environ.get("METR_CACHE") or "~/.cache/metr").expanduser()
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir()) / "metr"


class EmbeddingCache:
    """The embeddings of one encoder, in memory and on disk.

    If the folder cannot be read or written, one warning is logged and the cache works in memory.

    Args:
        identity: Names the encoder and everything else that its embeddings depend on.
        root: The folder of all encoders; by default `cache_root() / "text"`.
    """

    def __init__(self, identity: str, root: Path | None = None) -> None:
        digest = sha256(identity.encode()).hexdigest()
        self.folder = (cache_root() / "text" if root is None else root) / digest[:24]
        self._known: dict[str, Tensor] = {}
        self._read: set[Path] = set()
        self._warned = False

    def get(self, phrases: Sequence[str]) -> dict[str, Float[Tensor, "t"]]:
        """The embeddings of those phrases that are known."""
        if any(phrase not in self._known for phrase in phrases):
            self._read_files()
        return {phrase: self._known[phrase] for phrase in phrases if phrase in self._known}

    def put(self, phrases: Sequence[str], vectors: Float[Tensor, "n t"]) -> None:
        """Keeps the embeddings of a vocabulary in one file."""
        vectors = vectors.cpu().float().contiguous()
        self._known.update(zip(phrases, vectors, strict=True))
        listed = json.dumps(list(phrases))
        path = self.folder / f"{sha256(listed.encode()).hexdigest()}.safetensors"
        data = save({"vectors": vectors}, {"phrases": listed, "sha256": _checksum(vectors)})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._write(path, data)
        except OSError as error:
            self._warn(error)

    def _locked(self) -> AbstractContextManager[object]:
        """Lets one process at a time write; on a file system without locks, all of them."""
        try:
            return FileLock(self.folder / ".lock").acquire()
        except NotImplementedError:
            return nullcontext()

    def _write(self, path: Path, data: bytes) -> None:
        for left in self.folder.glob(f"*{_PART}"):  # of a process that was killed: whoever writes holds the lock
            left.unlink(missing_ok=True)
        fresh = path.with_name(f"{path.stem}-{secrets.token_hex(4)}{_PART}")
        try:
            fresh.write_bytes(data)
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)

    def _read_files(self) -> None:
        """Reads the files that are new since the last time."""
        try:
            new = {*self.folder.glob("*.safetensors")} - self._read
        except OSError as error:
            self._warn(error)
            return
        for path in sorted(new):
            self._known.update(_embeddings(path))
        self._read |= new

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            _logger.warning("text embeddings are not kept on disk: %s (set METR_CACHE to a writable folder)", error)
        self._warned = True


def _embeddings(path: Path) -> dict[str, Tensor]:
    """The phrases and vectors of a file; none if it is damaged or gone."""
    try:
        with safe_open(path, "pt") as file:
            metadata, vectors = file.metadata(), file.get_tensor("vectors")
        intact = metadata["sha256"] == _checksum(vectors)
        return dict(zip(json.loads(metadata["phrases"]), vectors, strict=True)) if intact else {}
    except (OSError, SafetensorError, LookupError, TypeError, ValueError):
        return {}


def _checksum(vectors: Float[Tensor, "n t"]) -> str:
    return sha256(vectors.numpy().tobytes()).hexdigest()
