"""Datasets as users name them: a path, `name=path`, or a datasets file, which is YAML that lists several."""

import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field

from metr.bounded_yaml import parse_yaml, with_line, yaml_text
from metr.config import Config, read_yaml
from metr.data.category_names import kept_names, label_map
from metr.data.containers.archives import archive_stem
from metr.data.dataset_config import DatasetConfig, SplitName
from metr.data.formats.base import ReadOptions
from metr.data.formats.files import expanded, there
from metr.data.formats.presence import LISTS
from metr.data.formats.registry import recognise
from metr.data.hub_datasets.address import HubAddress, is_hub_dataset
from metr.data.hub_datasets.fetched import fetch_dataset
from metr.data.index.annotation_index import AnnotationIndex
from metr.data.index.cache import default_cache, stored
from metr.data.other_formats import tell_other_formats
from metr.data.records import TEST, TRAIN, VAL, Annotations, DataIssue, Dropped, plan_splits
from metr.data.shards.addresses import is_address, is_pattern, name_of_pattern
from metr.data.shards.stores import is_url
from metr.errors import ConfigError, DataError

__all__ = [
    "DatasetConfig",
    "DatasetSource",
    "DatasetsFile",
    "SplitName",
    "check_names",
    "open_dataset",
    "parse_data_arguments",
]

logger = logging.getLogger(__name__)

# The keys of a dataset whose values are words, as they are written: a category may be called `no` or `007`.
_WORDS = frozenset(
    {"name", "path", "splits", "prompts", "synonyms", "absent", "renames", "exhaustive", "only", "drop", "ignore"}
)


class DatasetsFile(Config):
    """A YAML file that lists datasets: `datasets:` with a path, or a mapping of options, for each."""

    datasets: Annotated[list[dict[str, Any] | str], Field(min_length=1)]
    """The datasets: paths, or the options of `DatasetConfig`."""


@dataclass(frozen=True, kw_only=True)
class DatasetSource:
    """An opened dataset.

    Attributes:
        name: Its name in messages, results and vocabularies.
        format: The format that its files are written in.
        root: Its folder.
        config: The user's description of it, with all options.
        categories: Its names in the order of the labels.
        splits: Its annotations by split.
        issues: The first issues of each kind that were found while it was read.
        issue_counts: How many there were of each kind.
        held_out: Whether its val split is a seeded part of its own train split, because it has none.
        dropped: What was lost of each of its own splits while it was read, also of those that came to nothing.
    """

    name: str
    format: str
    root: Path
    config: DatasetConfig
    categories: tuple[str, ...]
    splits: Mapping[str, AnnotationIndex]
    issues: tuple[DataIssue, ...] = ()
    issue_counts: Mapping[str, int] = field(default_factory=dict)
    held_out: bool = False
    dropped: Mapping[str, Dropped] = field(default_factory=dict)

    @property
    def place(self) -> Path | str:
        """Where the dataset is, for messages: its folder, or the URL or path of its shards."""
        path = self.config.path
        return path if is_address(path) or is_pattern(path) or self.format == "webdataset" else self.root

    def split(self, name: str) -> AnnotationIndex:
        """The annotations of one split.

        Raises:
            DataError: the dataset has no such split.
        """
        if name not in self.splits:
            hint = f"it has {', '.join(self.splits)}; `splits` in a datasets file can say which is which"
            empty = (issue for issue in self.issues if issue.kind == "empty split" and issue.where == name)
            why = "".join(f": {issue.detail}" for issue in empty)
            raise DataError(f"no {name!r} split{why}", where=self.place, hint=hint)
        return self.splits[name]

    def renamed(self, names: Mapping[str, str]) -> "DatasetSource":
        """The dataset with other names for some of its categories: each a name that the dataset does not have yet."""
        if not names:
            return self
        config = self.config
        renames = {old: names.get(new, new) for old, new in config.renames.items()}
        renames |= {old: new for old, new in names.items() if old not in config.renames.values()}
        exhaustive = config.exhaustive and tuple(names.get(name, name) for name in config.exhaustive)
        only = config.only and tuple(names.get(name, name) for name in config.only)
        prompts = {names.get(name, name): phrase for name, phrase in config.prompts.items()}
        synonyms = {names.get(name, name): words for name, words in config.synonyms.items()}
        changes = {"renames": renames, "exhaustive": exhaustive, "only": only, "prompts": prompts, "synonyms": synonyms}
        return replace(
            self,
            config=config.model_copy(update=changes),
            categories=tuple(names.get(name, name) for name in self.categories),
            splits={split: index.renamed(names) for split, index in self.splits.items()},
        )

    def evaluation_split(self) -> tuple[str, Annotations]:
        """The split to evaluate on, and its name: "val", or "test" where a dataset has nothing to train on either.

        Where there is a train split, test is never taken: it would choose the best checkpoint that it then judges.

        Raises:
            DataError: the dataset has neither.
        """
        if VAL not in self.splits and TRAIN not in self.splits and TEST in self.splits:
            logger.warning("%s: no val split; evaluated on its test split", self.name)
            return TEST, self.splits[TEST]
        return VAL, self.split(VAL)


def parse_data_arguments(arguments: Sequence[str]) -> tuple[DatasetConfig, ...]:
    """The datasets that a command line names: paths, `name=path`, or datasets files.

    Raises:
        ConfigError: a datasets file has an unknown key or a wrong value.
        DataError: two datasets have the same name, or none is named.
    """
    configs = [config for argument in arguments for config in _parse_argument(argument)]
    if not configs:
        raise DataError("no dataset is named", hint="name a folder: metr inspect path/to/dataset")
    check_names(configs)
    return tuple(configs)


def check_names(configs: Sequence[DatasetConfig]) -> None:
    """Checks that each dataset has a name of its own.

    Raises:
        DataError: two have the same.
    """
    counts = Counter(config.name for config in configs)
    for config in configs:
        if counts[config.name] > 1:
            paths = " and ".join(str(other.path) for other in configs if other.name == config.name)
            hint = f"give each a name of its own: other_name={config.path}"
            if len({str(other.path) for other in configs if other.name == config.name}) == 1:
                hint = "name it once; `weight` in a datasets file takes more of it"
            raise DataError(f"{counts[config.name]} datasets are called {config.name!r}: {paths}", hint=hint)


def open_dataset(config: DatasetConfig, cache_dir: Path | None = None, *, together: bool = False) -> DatasetSource:
    """Recognises and reads a dataset, or opens its index where it has been read before and is unchanged.

    Args:
        config: The dataset.
        cache_dir: The folder of indices; None means `index` in METR_CACHE or in `~/.cache/metr`.
        together: Whether all images are one split, "all".

    Raises:
        DataError: the folder is missing, fits no known format, holds no image, or lacks what `config` names.
        StoreError: it is on the hub or in a store that cannot be reached.
    """
    config = _at_commit(config)
    reader = recognise(config.path, config.format)
    if config.boxes is not None and not reader.takes_boxes:
        what = f"`boxes` says how boxes are written, which is settled in the format {reader.format}"
        raise DataError(what, where=config.path, hint="take the key out, or name another `format`")
    reader.options = ReadOptions(boxes=config.boxes, name=config.name)
    wanted = None if config.splits is None else {str(key): _as_tuple(value) for key, value in config.splits.items()}
    plan = plan_splits(list(reader.splits), wanted, config.path)
    plan = plan.together() if together else plan
    cache = cache_dir or default_cache()
    dataset = stored(reader, plan, cache)
    if config.format is None:
        tell_other_formats(reader, config.path, dataset, cache)
    notes: list[DataIssue] = []
    kept = kept_names(dataset.manifest, config, notes)
    labels = label_map(dataset.manifest, kept, config, sort=not reader.declares_categories)
    counts: Counter[str] = Counter(issue.kind for issue in notes)
    for summary in dataset.manifest.issues.values():
        counts.update(summary.counts)
    found = [issue for split in dataset.manifest.issues for issue in dataset.issues(split)]
    source = DatasetSource(
        name=config.name,
        format=reader.format,
        root=reader.root,
        config=config,
        categories=labels.categories,
        splits={
            split: dataset.open(split, name=config.name, format_name=reader.format, labels=labels)
            for split in dataset.manifest.splits
        },
        issues=(*notes, *found),
        issue_counts=dict(counts),
        held_out=dataset.manifest.held_out,
        dropped={
            split: Dropped.of(summary.counts, of_images=reader.annotates_whole_images)
            for split, summary in dataset.manifest.issues.items()
            if split
        },
    )
    if source.held_out:
        _tell_held_out(source)
    return source


def _at_commit(config: DatasetConfig) -> DatasetConfig:
    """The same, of a dataset on the hub with the commit that its address means now; its files are fetched.

    Raises:
        DataError, StoreError: it cannot be fetched.
    """
    if not is_hub_dataset(config.path):
        return config
    address = fetch_dataset(HubAddress.parsed(str(config.path))).address
    return config.model_copy(update={"path": str(address)})


def _tell_held_out(source: DatasetSource) -> None:
    """Logs that val is a part of train, and that test, where there is one, is left for the last word."""
    val, train = len(source.splits[VAL]), len(source.splits[TRAIN])
    spared = "; test does not choose the best checkpoint" if TEST in source.splits else ""
    message = "%s: no val split; a seeded fifth of its training images (%d of %d) is held out as val%s"
    logger.warning(message, source.name, val, val + train, spared)


def _parse_argument(argument: str) -> list[DatasetConfig]:
    name, equals, rest = argument.partition("=")
    if is_address(argument):
        return [_dataset_config({"path": argument}, Path(), argument)]
    path = expanded(argument)
    if equals and name and not re.search(r"[\\/]", name) and not there(path):
        return [_dataset_config({"name": name, "path": rest}, Path(), argument)]
    if path.suffix.lower() in LISTS:
        written = read_yaml(path, as_written=True)
        if "datasets" in written or "names" not in written:  # with names it is the description of a YOLO dataset
            return _listed_datasets(path, written)
    return [_dataset_config({"path": argument}, Path(), argument)]


def _listed_datasets(file: Path, written: Mapping[str, Any]) -> list[DatasetConfig]:
    """The datasets of a datasets file, which is also given with its scalars as they are `written`.

    Raises:
        ConfigError: a key is unknown, has a wrong value or none; the message names the dataset and the line.
    """
    root: Any = parse_yaml(yaml_text(file))
    values = read_yaml(file)
    if isinstance(values.get("datasets"), list):
        pairs = zip(values["datasets"], written["datasets"], strict=True)
        values["datasets"] = [_with_words(item, words) for item, words in pairs]
    try:
        items = DatasetsFile.checked(values, where=file).datasets
    except ConfigError as error:
        raise with_line(error, file, root) from None
    listed = next(value for key, value in reversed(root.value) if key.value == "datasets")
    return [_listed_dataset(item, file, node) for item, node in zip(items, listed.value, strict=True)]


def _with_words(item: Any, words: Any) -> Any:
    """A listed dataset, whose `words` are as they are written: in place of the values that are words."""
    if isinstance(item, dict):
        return {key: words[key] if key in _WORDS and value is not None else value for key, value in item.items()}
    return item if item is None or isinstance(item, list) else words


def _listed_dataset(item: Mapping[str, Any] | str, file: Path, node: yaml.Node) -> DatasetConfig:
    """A dataset of a datasets file, and where it stands there; its path is relative to the file.

    Raises:
        ConfigError: a key is unknown, has a wrong value or none; the message names the dataset and the line.
    """
    called = ""
    if isinstance(item, str):
        name, equals, path = ("", "", item) if is_address(item) else item.rpartition("=")
        if is_address(item.partition("=")[2]):
            name, equals, path = item.partition("=")
        item = {"name": name, "path": path} if equals else {"path": path}
    elif "path" in item or "name" in item:
        called = f"dataset {item.get('name', item.get('path'))!r}: "
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if isinstance(value, yaml.ScalarNode) and not value.value and not value.style:
            hint = "write its value behind it or below it, indented, or take the line out"
            where = f"{file}, line {key.start_mark.line + 1}"
            raise ConfigError(f"{called}{key.value!r} has no value", where=where, hint=hint)
    try:
        return _dataset_config(item, file.parent, file)
    except ConfigError as error:
        raise with_line(error, file, node, called) from None


def _dataset_config(values: Mapping[str, Any], base: Path, where: object) -> DatasetConfig:
    path = values.get("path")
    if not isinstance(path, str) or not path.strip():
        raise ConfigError("a dataset without a path", where=where, hint="write path: and the dataset's folder")
    if "\0" in path:
        raise ConfigError(f"a path with a zero byte: {path!r}", where=where, hint="take it out")
    if is_hub_dataset(path):
        address = HubAddress.parsed(path, where)
        return DatasetConfig.checked({"name": address.name, **values, "path": str(address)}, where=where)
    if is_url(path):
        return DatasetConfig.checked({"name": name_of_pattern(path), **values}, where=where)
    full = base / expanded(path)
    resolved = Path(os.path.realpath(full))  # `resolve` raises an error for a link to itself
    default_name = resolved.name
    if there(resolved, Path.is_file):
        default_name = archive_stem(resolved) or resolved.parent.name
    elif is_pattern(resolved) and not there(resolved):
        default_name = name_of_pattern(resolved.as_posix())
    return DatasetConfig.checked({"name": default_name, **values, "path": full}, where=where)


def _as_tuple(value: tuple[str, ...] | str) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value
