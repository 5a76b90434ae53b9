"""Checkpoints for others: a folder with its model card, and a repository of the hub."""

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download

from metr.checkpoint import CARD, EVALUATION, FILES, is_untouched, persons_card, save_checkpoint
from metr.errors import ConfigError
from metr.evaluation.results import as_dict
from metr.hub_refusals import asking
from metr.model import METR
from metr.sharing.model_card import CardFacts, write_card

__all__ = ["push", "save"]

_logger = logging.getLogger(__name__)


def save(
    model: METR,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    licence: str | None = None,
    repository: str | None = None,
) -> None:
    """Writes a checkpoint folder with a model card, and with the results of `metr evaluate` where there are some.

    A README.md that a person wrote or changed stays as it is, whether it lies in `folder` or where the model was
    loaded from.

    Args:
        model: The detector.
        folder: Made if it is missing, replaced if it holds a checkpoint.
        dtype: The type of the weights on disk, such as `torch.float16`; by default the network's.
        licence: The model's, by the hub's identifier ("apache-2.0"), for the card's header.
        repository: Its name on the hub, which the card tells.

    Raises:
        CheckpointError: the folder holds something else, or the disk refuses.
    """
    facts = CardFacts.of(model, Path(folder).name, repository=repository, licence=licence, dtype=dtype)
    own = None if model.folder is None else persons_card(model.folder)
    beside = {CARD: own or str(write_card(facts))}
    if facts.report is not None:
        beside[EVALUATION] = json.dumps(as_dict(facts.report), indent=1, ensure_ascii=False) + "\n"
    save_checkpoint(Path(folder), model.with_weights(), dtype=dtype, beside=beside)


def push(
    model: METR | str | Path,
    repository: str,
    *,
    dtype: torch.dtype | None = None,
    licence: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    **options: Any,
) -> str:
    """Sends a checkpoint and its model card to a repository of the hub, which is made if it is missing.

    A README.md there that a person wrote or changed stays as it is.

    Args:
        model: The detector, or its run or checkpoint folder.
        repository: Its name, "user/name".
        dtype: The type of the weights that are sent, such as `torch.float16`; by default the network's.
        licence: The model's, by the hub's identifier ("apache-2.0"), for the card's header.
        private: Whether a new repository is private; by default as the owner's settings say.
        token: The hub's; by default that of `hf auth login` or HF_TOKEN.
        branch: Made from `main` if it is missing; by default `main`.
        options: Passed to huggingface-hub's `upload_folder`: `commit_message`, `create_pr`, `delete_patterns`, ...

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: there is no such checkpoint, or the hub cannot be reached or does not allow it.
        ConfigError: `repository` is not of the form "user/name".
    """
    if repository.count("/") != 1:
        what = f"expected user/name, found {repository!r}"
        raise ConfigError(what, where="repository", hint="put your name before it")
    model = model if isinstance(model, METR) else METR.from_pretrained(model, device="cpu")
    api, files = HfApi(token=token), list(FILES)
    with asking(repository, branch), tempfile.TemporaryDirectory() as folder:
        api.create_repo(repository, private=private, exist_ok=True)
        if branch is not None:
            api.create_branch(repository, branch=branch, exist_ok=True)
        if _has_a_persons_card(api, repository, branch):
            _logger.info("%s: its %s was written or changed by a person and stays as it is", repository, CARD)
            files.remove(CARD)
        place = Path(folder, repository)
        save(model, place, dtype=dtype, licence=licence, repository=repository)
        options = {"commit_message": "Push with METR", **options}
        done = api.upload_folder(
            repo_id=repository, folder_path=place, revision=branch, allow_patterns=files, **options
        )
    return str(done)


def _has_a_persons_card(api: HfApi, repository: str, branch: str | None) -> bool:
    """Whether the README.md of a repository, if it is there, was written or changed by a person."""
    if not api.file_exists(repository, CARD, revision=branch):
        return False
    with tempfile.TemporaryDirectory() as folder:
        path = hf_hub_download(repository, CARD, revision=branch, token=api.token, cache_dir=folder)
        return not is_untouched(Path(path).read_text(encoding="utf-8", errors="replace"))
