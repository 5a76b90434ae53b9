"""Where a detector lies: a folder or a file of this machine, or a repository of the hub; what it is; and its files."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from metr.errors import CheckpointError, ConfigError, MetrError
from metr.hub import fetch, is_fetched, listed_files, may_be_a_hub_name
from metr.run_directory import CONFIG, WEIGHTS, RunDirectory, existing_folder, find_checkpoint

__all__ = ["DetectorSource", "find_source", "has_weights", "look_here", "refuse_without_weights"]

_logger = logging.getLogger(__name__)

Kind = Literal["metr", "transformers", "file"]
_INDEX = f"{WEIGHTS}.index.json"
_TRANSFORMERS = (
    CONFIG,
    "preprocessor_config.json",
    "processor_config.json",
    WEIGHTS,
    _INDEX,
    "model-*-of-*.safetensors",
)
_PICKLED = (".bin", ".pth", ".pt", ".ckpt", ".pkl", ".h5", ".msgpack")
# what a config.json of transformers has at least one of
_THEIR_KEYS = ("model_type", "architectures", "auto_map", "_name_or_path", "transformers_version")
_NO_FILES = (".safetensors", ".json", ".yaml", ".yml", ".md", ".onnx")


@dataclass(frozen=True, kw_only=True)
class DetectorSource:
    """A detector that was found, and perhaps not yet fetched.

    Attributes:
        kind: `metr`: a checkpoint or a run of METR; `transformers`: a folder of transformers; `file`: a `.pth` file.
        path: Its folder or file. Of a repository: the download, which holds its configuration alone at first.
        called: Its name for people: the repository, or the path as it was given.
        repository: Its name on the hub; None of what lies here.
        commit: The commit that was found there.
        options: How the hub is asked, as of `find_source`.
    """

    kind: Kind
    path: Path
    called: str
    repository: str | None = None
    commit: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def pinned(self) -> str:
        """What finds the same files again: the absolute path, or user/name@commit."""
        return str(self.path.resolve()) if self.repository is None else f"{self.repository}@{self.commit}"

    @property
    def public_name(self) -> str:
        """Its name without the folders of this machine, as a checkpoint that is shared may tell it."""
        return self.path.resolve().name if self.repository is None else self.repository

    @property
    def config(self) -> dict[str, Any]:
        """What its config.json says.

        Raises:
            CheckpointError: it is damaged.
        """
        return _values(self.path / CONFIG)

    def fetched(self) -> Path:
        """Its folder or file, with all files that are needed: downloaded once, all of one commit.

        Raises:
            CheckpointError: the hub cannot be reached or refuses, or files are missing there.
        """
        if self.repository is None:
            return self.path
        from metr.checkpoint import FILES

        patterns = FILES if self.kind == "metr" else _TRANSFORMERS
        if not is_fetched(self.repository, (WEIGHTS, _INDEX), self.commit, self.options):
            _logger.info("fetching %s from the hub", self.repository)
        folder = fetch(self.repository, patterns, revision=self.commit, **self.options)
        if self.kind == "metr":
            _check_whole(folder, self.repository)
        elif not has_weights(folder):
            refuse_without_weights(listed_files(self.repository, self.commit, self.options), self.repository)
        return folder

    @contextmanager
    def in_its_name(self) -> Iterator[None]:
        """Makes errors about files in the hub's cache tell the repository in place of the cache's folder."""
        try:
            yield
        except MetrError as error:
            folder, where = str(self.path), str(error.where)
            if self.repository is None or not where.startswith(folder):
                raise
            name = f"{self.repository}{where.removeprefix(folder)}"
            raise type(error)(error.what, where=name, hint=error.hint) from error


def find_source(source: str | Path, *, revision: str | None = None, **options: Any) -> DetectorSource:
    """Finds a detector, and what it is. Of a repository only the configuration is fetched.

    Args:
        source: A checkpoint or run folder of METR, a folder of transformers, a `.pth` file, or a name on the hub:
            "user/name", or "user/name@revision". A path that exists goes before a name on the hub.
        revision: A branch, a tag or a commit of the hub, in place of "@revision"; by default the newest of `main`.
        options: `token`, `cache_dir`, `local_files_only` and `force_download` of huggingface-hub.

    Raises:
        CheckpointError: there is no such path and no such name on the hub, the hub cannot be reached or refuses, or
            what is there is no detector.
    """
    path = look_here(source)
    if path is not None:
        return _here(path, str(source))
    name, at, given = str(source).partition("@")
    if at and not given:
        what = "expected a branch, a tag or a commit after @, found nothing"
        raise CheckpointError(what, where=source, hint=f"name one, or write {name} for the newest of main")
    if given and revision not in {None, given}:
        raise ConfigError(f"two revisions: {given} and {revision}", where=source, hint="give one of them")
    return _on_the_hub(name, given or revision, options)


def look_here(source: str | Path) -> Path | None:
    """The path of a detector on this machine; None where there is no such path and the name may be one of the hub.

    Nothing is read, so torch is not imported.

    Raises:
        CheckpointError: there is no such path and it is no name on the hub, or what is there is no detector.
    """
    if not str(source).strip():
        raise CheckpointError("expected a folder, a file or a name on the hub, found an empty name", hint="name one")
    path = Path(source).expanduser()
    try:
        here = path.exists() or existing_folder(path).is_dir()
    except (OSError, ValueError) as error:  # too long, or with a null character
        raise CheckpointError(f"is no path: {error}", where=str(source)[:200], hint="check the path") from None
    if here:
        _check_here(path)
        return path
    if not may_be_a_hub_name(str(source).partition("@")[0]):
        what = "no such checkpoint, folder or file here, and no name on the hub either, which has the form user/name"
        raise CheckpointError(what, where=source, hint="check the path, or name the repository: user/name@revision")
    return None


def _here(path: Path, called: str) -> DetectorSource:
    """What lies at a path where a detector is."""
    if path.is_file():
        return DetectorSource(kind="file", path=path, called=called)
    folder = find_checkpoint(path)
    kind: Kind = "transformers" if folder == path and _is_theirs(_values(path / CONFIG)) else "metr"
    return DetectorSource(kind=kind, path=path, called=called)


def _check_here(path: Path) -> None:
    """Checks that what lies at a path looks like a detector.

    Raises:
        CheckpointError: it does not.
    """
    if path.is_file():
        if path.suffix in _NO_FILES:
            what = "is one file of a folder, and a detector is the folder"
            raise CheckpointError(what, where=path, hint=f"name the folder: {path.parent}")
        return
    run = RunDirectory(path)
    if not any((existing_folder(one) / CONFIG).is_file() for one in (path, run.best, run.last)):
        pickled = [one.name for one in path.iterdir() if one.suffix in _PICKLED] if path.is_dir() else []
        what = f"expected a checkpoint ({CONFIG} and {WEIGHTS}) or a run folder that holds one, or a folder of "
        what += "transformers with these files"
        hint = f"name the file itself: {path / pickled[0]}" if pickled else "name the folder itself, such as RUN/best"
        raise CheckpointError(what, where=path, hint=hint)


def _on_the_hub(name: str, revision: str | None, options: Mapping[str, Any]) -> DetectorSource:
    """What a repository of the hub holds.

    Raises:
        CheckpointError: the hub cannot be reached or refuses, or the repository is no detector's.
    """
    folder = fetch(name, [CONFIG], revision=revision, **options)
    commit = folder.name  # a folder of the hub's cache is called by its commit
    config = folder / CONFIG
    values = _values(config) if config.is_file() else {}
    if values.get("format") != "metr" and not _is_theirs(values):
        there = f"its {CONFIG} is of neither" if config.is_file() else f"it has no {CONFIG}"
        what = f"this repository holds no METR checkpoint and no detector of transformers: {there}"
        hint = "for a .pth file that lies there: download it, and name the file"
        raise CheckpointError(what, where=name, hint=hint)
    kind: Kind = "metr" if values.get("format") == "metr" else "transformers"
    return DetectorSource(kind=kind, path=folder, called=name, repository=name, commit=commit, options=options)


def _values(path: Path) -> dict[str, Any]:
    """The values of a file in JSON."""
    from metr.serialization import read_json  # it imports torch

    return read_json(path)


def _is_theirs(config: Mapping[str, Any]) -> bool:
    """Whether these are the values of a config.json of transformers."""
    return config.get("format") != "metr" and any(key in config for key in _THEIR_KEYS)


def has_weights(folder: Path) -> bool:
    """Whether a folder of transformers holds safetensors."""
    return any((folder / name).is_file() for name in (WEIGHTS, _INDEX))


def _check_whole(folder: Path, repository: str) -> None:
    """Checks that all files of a METR checkpoint are there.

    Raises:
        CheckpointError: one is missing.
    """
    from metr.checkpoint import EMBEDDINGS, VOCABULARY

    if missing := [name for name in (WEIGHTS, EMBEDDINGS, VOCABULARY) if not (folder / name).is_file()]:
        what = f"{missing[0]}: no such file in this repository; METR reads weights from safetensors only"
        raise CheckpointError(what, where=repository, hint="ask its owner to push it again with metr push")


def refuse_without_weights(there: Iterable[str], where: object) -> NoReturn:
    """Says that a folder or a repository of transformers holds no weights that METR reads.

    Args:
        there: The names of its files, as far as they are known.
        where: The folder or repository, for messages.

    Raises:
        CheckpointError: always.
    """
    pickled = sorted(name for name in there if name.endswith(_PICKLED))
    found = f"only {pickled[0]}, which could run code when it is read" if pickled else "no weights"
    hint = "name a repository or a revision with safetensors, or convert it: from_pretrained, then save_pretrained"
    raise CheckpointError(f"expected {WEIGHTS}, found {found}", where=where, hint=hint)
