"""The Hugging Face hub: models of others are loaded quietly through transformers, and its errors are explained."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from metr.errors import CheckpointError, ModelError

__all__ = ["asking", "loading", "may_be_a_hub_name", "quiet"]

_FAILURES = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)
# the root of what the HTTP library raises, whichever the hub's library uses
_HTTP_ERROR = cast("type[Exception]", HfHubHTTPError.__bases__[0])
_HUB_FAILURES = (_HTTP_ERROR, OSError, ValueError, RuntimeError)
_REFUSED = (401, 403)


def may_be_a_hub_name(source: str) -> bool:
    """Whether this looks like user/name: one slash, and no path of this machine."""
    return source.count("/") == 1 and not source.startswith((".", "/", "~"))


@contextmanager
def loading(source: str) -> Iterator[None]:
    """Wraps calls of transformers that read the model `source`, a hub name or a folder.

    Hides transformers' progress bars, load reports and warnings, such as those about weights that a network without its
    head leaves unused. Downloads still show their progress.

    Raises:
        ModelError: the model cannot be loaded, or is not of the kind that was asked for.
    """
    try:
        with quiet():
            yield
    except _FAILURES as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        what = f"cannot load this model: {lines[0]}"
        raise ModelError(what, where=source, hint=_hint(source, error)) from error


@contextmanager
def asking(repository: str, revision: str | None = None) -> Iterator[None]:
    """Wraps calls of the hub's library about a repository of METR's.

    Raises:
        CheckpointError: the hub cannot be reached, or refuses; the message says why and what to try.
    """
    try:
        yield
    except _HUB_FAILURES as error:
        what, hint = _refusal(error, revision)
        raise CheckpointError(what, where=repository, hint=hint) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Hides the progress bars and warnings of transformers."""
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


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _refusal(error: Exception, revision: str | None) -> tuple[str, str]:
    """What went wrong between here and the hub, and what to try."""
    causes = list(_causes(error))
    kinds = {kind for cause in causes for kind in type(cause).__mro__}
    codes = {cause.response.status_code for cause in causes if isinstance(cause, HfHubHTTPError)}
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if GatedRepoError in kinds:
        what, hint = "its owner grants access one by one", "ask for access on its page, then `hf auth login`, or token="
    elif RevisionNotFoundError in kinds:
        what, hint = f"no revision {revision or 'main'!r}", "a branch, a tag or a commit that its page lists"
    elif RepositoryNotFoundError in kinds:
        what = "neither a folder here nor a model on the hub that may be seen"
        hint = "check the path or the name; for a private model, `hf auth login`, or token="
    elif LocalTokenNotFoundError in kinds or codes & {*_REFUSED}:
        what = f"the hub does not allow this: {first}"
        hint = "`hf auth login` with a token that may, or token="
    elif HFValidationError in kinds:
        what, hint = f"not a name on the hub: {first}", "user/name"
    elif codes:
        what, hint = f"the hub answers with an error: {first}", "try again later"
    elif OfflineModeIsEnabled in kinds or (LocalEntryNotFoundError in kinds and len(causes) == 1):
        what = "not among what was fetched before, and nothing is to be fetched"
        hint = "leave local_files_only and HF_HUB_OFFLINE out once"
    elif {LocalEntryNotFoundError, _HTTP_ERROR} & kinds:
        what, hint = f"the hub cannot be reached ({first})", "check the connection, and HF_ENDPOINT if it is set"
    else:
        last = (str(causes[-1]).strip().splitlines() or [type(causes[-1]).__name__])[0]
        what = first if last == first else f"{first} {last}"
        hint = "check the name, the connection and the room on the disk"
    return what, hint


def _hint(source: str, error: Exception) -> str:
    causes = {kind for cause in _causes(error) for kind in type(cause).__mro__}
    if Path(source).is_dir():
        return "the folder must hold config.json and model.safetensors, as save_pretrained writes them"
    if GatedRepoError in causes:
        return "ask for access on the model's page, then `hf auth login`"
    if {RepositoryNotFoundError, RevisionNotFoundError} & causes:
        return "check the name and revision; for a private model, `hf auth login`"
    if OSError in causes:
        return "connect to the internet once, or download the model elsewhere and name its folder"
    return "name another model"
