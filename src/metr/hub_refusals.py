"""What the Hugging Face hub refuses, and why it cannot be asked: in METR's words, with what to try."""

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, cast

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

from metr.errors import CheckpointError, DataError, MetrError, StoreError

__all__ = ["HUB_FAILURES", "RepositoryKind", "asking", "causes_of"]

RepositoryKind = Literal["model", "dataset"]
# the root of what the HTTP library raises, whichever the hub's library uses
_HTTP_ERROR = cast("type[Exception]", HfHubHTTPError.__bases__[0])
HUB_FAILURES = (_HTTP_ERROR, OSError, ValueError, RuntimeError)
"""What the hub's library raises where the hub cannot be asked, or refuses."""
_REFUSED = (401, 403)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_BROKE_OFF, _NO_HUB, _NO_ROOM = "the download broke off", "what answers is not the hub", "the disk is full"
# how messages begin that say that something of this name is there, or that the hub does not say
_ASKED = (_BROKE_OFF, _NO_HUB, _NO_ROOM)


@contextmanager
def asking(
    repository: str, revision: str | None = None, *, kind: RepositoryKind = "model", found: str = ""
) -> Iterator[None]:
    """Wraps calls of the hub's library about a repository.

    Args:
        repository: Its name.
        revision: What of it is asked for.
        kind: What it holds.
        found: What to add where the hub says nothing about the name, because nobody can ask it.

    Raises:
        CheckpointError: of a model: the hub cannot be reached, or refuses; the message says why and what to try.
        DataError: of a dataset: the hub refuses.
        StoreError: of a dataset: the hub cannot be reached.
    """
    try:
        yield
    except HUB_FAILURES as error:
        what, hint, answered = _refusal(error, revision, kind)
        asked = answered or what.startswith(_ASKED)
        wrong: type[MetrError] = CheckpointError
        if kind == "dataset":
            wrong = DataError if answered else StoreError
        raise wrong(what if asked else what + found, where=repository, hint=hint) from error


def causes_of(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _refusal(error: Exception, revision: str | None, kind: RepositoryKind) -> tuple[str, str, bool]:
    """What went wrong between here and the hub, what to try, and whether the hub has answered."""
    causes = list(causes_of(error))
    kinds = {base for cause in causes for base in type(cause).__mro__}
    codes = {cause.response.status_code for cause in causes if isinstance(cause, HfHubHTTPError)}
    token = "token=" if kind == "model" else "HF_TOKEN"
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if GatedRepoError in kinds:
        what, hint = (
            "its owner grants access one by one",
            f"ask for access on its page, then `hf auth login`, or {token}",
        )
    elif RevisionNotFoundError in kinds:
        what, hint = f"no revision {revision or 'main'!r}", "a branch, a tag or a commit that its page lists"
    elif RepositoryNotFoundError in kinds:
        what, path = "no dataset of this name on the hub that may be seen", ""
        if kind == "model":
            what, path = "neither a folder here nor a model on the hub that may be seen", "path or the "
        hint = f"check the {path}name; for a private {kind}, `hf auth login`, or {token}"
    elif LocalTokenNotFoundError in kinds or codes & {*_REFUSED}:
        what = f"the hub does not allow this: {first}"
        hint = f"`hf auth login` with a token that may, or {token}"
    elif codes:
        what, hint = f"the hub answers with an error: {first}", "try again later"
    else:
        return *_without_answer(causes, kinds, first), False
    return what, hint, True


def _without_answer(causes: Sequence[BaseException], kinds: set[type], first: str) -> tuple[str, str]:
    """What went wrong where the hub has refused nothing, and what to try."""
    if HFValidationError in kinds:
        return f"not a name on the hub: {first}", "user/name"
    if any(getattr(cause, "errno", None) in _FULL for cause in causes):
        what = f"{_NO_ROOM}, so it cannot be downloaded"
        return what, "make room, or name another disk: HF_HOME=FOLDER, or cache_dir="
    if OfflineModeIsEnabled in kinds or (LocalEntryNotFoundError in kinds and len(causes) == 1):
        what = "not among what was fetched before, and nothing is to be fetched"
        return what, "leave --offline (local_files_only, HF_HUB_OFFLINE) out once"
    if "Consistency check" in first or any("peer closed connection" in str(cause) for cause in causes):
        return f"{_BROKE_OFF} ({first})", "give the same command again: files that have arrived are kept"
    if {LocalEntryNotFoundError, _HTTP_ERROR} & kinds:
        return f"the hub cannot be reached ({first})", "check the connection, and HF_ENDPOINT if it is set"
    if any(isinstance(cause, ValueError) and "line 1 column" in str(cause) for cause in causes):
        return (
            f"{_NO_HUB}, but some other page",
            "log in to the network if it asks for that; check HF_ENDPOINT if it is set",
        )
    last = (str(causes[-1]).strip().splitlines() or [type(causes[-1]).__name__])[0]
    what = first if last == first else f"{first} {last}"
    return what, "check the name, the connection and the room on the disk"
