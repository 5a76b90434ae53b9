"""Sharing: checkpoints as repositories of the hub, each with a model card."""

import json
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard, ModelHubMixin, hf_hub_download, snapshot_download

from metr.checkpoint import CONFIG, EMBEDDINGS, VOCABULARY, WEIGHTS, Checkpoint, save_checkpoint
from metr.errors import CheckpointError, ConfigError
from metr.evaluation.results import as_dict
from metr.hub import asking
from metr.models.detector import Detector
from metr.run_directory import existing_folder
from metr.serialization import read_json
from metr.sharing.model_card import CARD, EVALUATION, TAGS, UNKNOWN, CardFacts, find_report, is_untouched, write_card

FILES = (CONFIG, WEIGHTS, EMBEDDINGS, VOCABULARY, CARD, EVALUATION)
"""What a checkpoint on the hub may consist of: nothing else is fetched or sent."""
_logger = logging.getLogger(__name__)


class Shared(ModelHubMixin, library_name="metr", pipeline_tag="object-detection", tags=list(TAGS)):
    """A model that can be saved with its card and pushed to the hub.

    The mixin's own saving would delete the old configuration before the new weights are there, and its own loading asks
    for one file after the other; so folders are written whole or not at all, and repositories read as of one commit.
    """

    network: Detector
    checkpoint: Checkpoint
    # not None, or the mixin would copy the constructor's arguments, weights and all, for a configuration of its own
    _hub_mixin_config: Any = MappingProxyType({})
    _source: Path | None = None
    """The folder that it was loaded from."""

    def save_pretrained(  # type: ignore[override]  # a METR has no configuration but its own
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        licence: str | None = None,
        config: None = None,  # noqa: ARG002
        model_card_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes a checkpoint folder that `from_pretrained` reads, with a model card.

        A README.md that a person wrote or changed, there or in the folder that this was loaded from, stays as it is.

        Args:
            folder: Where to.
            dtype: Of the weights on disk, such as `torch.float16`.
            licence: The model's, by the hub's identifier ("apache-2.0"), for the card's header.
            config: Of the mixin, without a meaning here.
            model_card_kwargs: How the mixin's `push_to_hub` hands on the two above and the repository's name.

        Raises:
            CheckpointError: the folder holds something else, or the disk refuses.
        """
        told: dict[str, Any] = {"dtype": dtype, "licence": licence} | dict(model_card_kwargs or {})
        target = Path(folder)
        facts = self._facts(title=target.name, **told)
        beside = {CARD: _persons_card(target) or _persons_card(self._source) or write_card(facts)}
        if facts.report is not None:
            beside[EVALUATION] = json.dumps(as_dict(facts.report), indent=1, ensure_ascii=False) + "\n"
        whole = replace(self.checkpoint, weights=self.network.state_dict())
        save_checkpoint(target, whole, dtype=told["dtype"], beside=beside)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        dtype: torch.dtype | None = None,
        licence: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        **options: Any,
    ) -> str:
        """Sends the checkpoint and its card to a repository of the hub, which is made if it is missing.

        A README.md there that a person wrote or changed stays as it is.

        Args:
            repo_id: "user/name".
            dtype: Of the weights that are sent, such as `torch.float16`.
            licence: The model's, by the hub's identifier ("apache-2.0"), for the card's header.
            private: Whether a new repository is; by default as the owner's settings say.
            token: Of the hub; by default that of `hf auth login` or HF_TOKEN.
            options: `commit_message`, `branch` (made from main if it is missing), `create_pr`, `delete_patterns` of
                huggingface-hub's mixin.

        Returns:
            The address of the commit.

        Raises:
            CheckpointError: the hub cannot be reached or does not allow it.
            ConfigError: `repo_id` is not of the form "user/name".
        """
        if repo_id.count("/") != 1:
            raise ConfigError(f"expected user/name, found {repo_id!r}", where="repo_id", hint="put your name before it")
        told = {"dtype": dtype, "licence": licence, "repository": repo_id}
        with asking(repo_id, options.get("branch")):
            _make_branch(repo_id, options.get("branch"), private, token)
            sent = list(FILES)
            if _persons_card_on_hub(repo_id, options.get("branch"), token):
                _logger.info("%s: its %s was written or changed by a person and stays as it is", repo_id, CARD)
                sent.remove(CARD)
            return super().push_to_hub(
                repo_id, private=private, token=token, allow_patterns=sent, model_card_kwargs=told, **options
            )

    def generate_model_card(self, **told: Any) -> ModelCard:
        """The card that `save_pretrained` would write.

        Args:
            told: `title`, `repository`, `licence` and `dtype`.
        """
        return ModelCard(write_card(self._facts(**{"title": "metr"} | told)))

    def _facts(
        self,
        title: str,
        *,
        repository: str | None = None,
        licence: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> CardFacts:
        source = self._source
        return CardFacts(
            title=title,
            checkpoint=self.checkpoint,
            parameters=sum(parameter.numel() for parameter in self.network.parameters()),
            report=find_report(source, self.checkpoint) if source is not None else None,
            repository=repository,
            licence=licence or UNKNOWN,
            dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        )


def fetched(
    name: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """The folder of a checkpoint of the hub, all files as of one commit; what is here already is not fetched again.

    The configuration comes first: a repository of something else costs no more.

    Raises:
        CheckpointError: the hub cannot be reached, or does not give such a checkpoint.
    """
    options: dict[str, Any] = {
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
        "force_download": force_download,
    }
    with asking(name, revision):
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[CONFIG], **options))
    config = folder / CONFIG
    if not config.is_file() or read_json(config).get("format") != "metr":
        hint = "weights of some other detectors can become METR's: METR.from_detector, metr transfer --from"
        raise CheckpointError("this repository holds no METR checkpoint", where=name, hint=hint)
    with asking(name, revision):
        return Path(snapshot_download(name, revision=folder.name, allow_patterns=list(FILES), **options))


def may_be_a_hub_name(source: str) -> bool:
    """user/name: one slash, and no path of this machine."""
    return source.count("/") == 1 and not source.startswith((".", "/", "~"))


def _persons_card(folder: Path | None) -> str | None:
    """The README.md of a folder, if a person wrote or changed it."""
    path = None if folder is None else existing_folder(folder) / CARD
    if path is None or not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        hint = "make it readable as UTF-8, or move it away"
        raise CheckpointError(f"cannot be read, and is not to be lost: {error}", where=path, hint=hint) from None
    return None if is_untouched(text) else text


def _make_branch(repo_id: str, branch: str | None, private: bool | None, token: str | None) -> None:
    """A branch can be written to only where it is there already."""
    if branch is None:
        return
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    api.create_branch(repo_id, branch=branch, exist_ok=True)


def _persons_card_on_hub(repo_id: str, branch: str | None, token: str | None) -> bool:
    """Whether the README.md of a repository, if it is there, was written or changed by a person."""
    if not HfApi(token=token).file_exists(repo_id, CARD, revision=branch):
        return False
    with tempfile.TemporaryDirectory() as folder:
        path = hf_hub_download(repo_id, CARD, revision=branch, token=token, cache_dir=folder)
        return not is_untouched(Path(path).read_text(encoding="utf-8", errors="replace"))
