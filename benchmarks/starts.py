"""The checkpoint that a study begins with, where it does not train one itself."""

from collections.abc import Collection, Sequence
from hashlib import file_digest
from pathlib import Path

import runner
from metr.errors import ConfigError
from metr.model import METR
from metr.run_directory import RunDirectory

SHIPPED = runner.HERE.parent / "checkpoints" / "metr-nano"
"""The project's own checkpoint: profiles without a pretraining begin with it, unless another is given."""
_WEIGHTS = "model.safetensors"
_DIGITS = 16


def datasets_of(source: str) -> tuple[str, ...]:
    """The datasets that a checkpoint was trained on.

    Raises:
        MetrError: there is no checkpoint.
    """
    return tuple(METR.from_pretrained(source, device="cpu").vocabulary.datasets)


def check_source(source: str, seen: Collection[str], new: Sequence[str]) -> None:
    """Refuses a checkpoint that has not seen some datasets, or has seen what is to be new.

    Raises:
        ConfigError: it does not fit.
        MetrError: there is no checkpoint.
    """
    known, hint = datasets_of(source), "begin with another checkpoint (--from), or let the profile train one"
    if missing := [name for name in seen if name not in known]:
        raise ConfigError(
            f"has not seen {', '.join(missing)}, so there is nothing to rehearse", where=source, hint=hint
        )
    if old := [name for name in new if name in known]:
        raise ConfigError(f"has seen {', '.join(old)} already, which is to be new", where=source, hint=hint)


def weights_digest(source: str) -> str | None:
    """The first digits of the SHA-256 of a checkpoint's weights, as one folder may hold other weights later; None where
    no folder is found.
    """
    run = RunDirectory(Path(source))
    files = [folder / _WEIGHTS for folder in (run.path, run.best, run.last)]
    for file in filter(Path.is_file, files):
        with file.open("rb") as stream:
            return file_digest(stream, "sha256").hexdigest()[:_DIGITS]
    return None
