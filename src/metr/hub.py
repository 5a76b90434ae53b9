"""Pretrained models of others, by hub name or folder, through transformers: loaded quietly, failures explained."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from metr.errors import ModelError

_FAILURES = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)


@contextmanager
def loading(source: str) -> Iterator[None]:
    """Wraps calls of transformers that read the model `source`, a hub name or a folder.

    Its progress bars, load reports and warnings are kept back: weights that a headless network leaves unused are
    no news. What is downloaded still shows its progress.

    Raises:
        ModelError: the model cannot be had, or is not what was asked for.
    """
    try:
        with quiet():
            yield
    except _FAILURES as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        what = f"cannot load this model: {lines[0]}"
        raise ModelError(what, where=source, hint=_hint(source, error)) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the progress bars and warnings of transformers back."""
    log: Any = transformers_logging  # partly without types
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def _hint(source: str, error: Exception) -> str:
    causes: set[type] = set()
    cause: BaseException | None = error
    while cause is not None:
        causes.update(type(cause).__mro__)
        cause = cause.__cause__
    if Path(source).is_dir():
        return "the folder must hold config.json and model.safetensors, as save_pretrained writes them"
    if GatedRepoError in causes:
        return "ask for access on the model's page, then `hf auth login`"
    if {RepositoryNotFoundError, RevisionNotFoundError} & causes:
        return "check the name and revision; for a private model, `hf auth login`"
    if OSError in causes:
        return "connect to the internet once, or download the model elsewhere and name its folder"
    return "name another model"
