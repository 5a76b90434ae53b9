"""A listing of the datasets for a person to edit: what holds is written, what is suggested is commented out."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import wrap

import yaml

from metr.config import read_yaml
from metr.data.datasets_file import DatasetSource
from metr.data.formats.base import plain_name
from metr.data.formats.registry import recognise
from metr.data.splits import TEST, TRAIN, VAL, canonical_split
from metr.errors import ConfigError
from metr.inspection.coverage import Coverage
from metr.inspection.suggestions import Suggestion

_WIDTH = 110
_SUFFIXES = (".yaml", ".yml")
# Names that perhaps stand unlabelled, told above a dataset.
_TOLD = 5

_HEAD = """\
# Datasets to train on together:   metr train {file} -o runs/joint
#
# Nothing is joined, renamed or left out unless this file says so. A line that begins with "#" and stands below a
# dataset is a suggestion, or what holds anyway: without its "# " it counts. (A name under "# renames:" or "# prompts:"
# needs that line too.)
#
#   path        the dataset's folder or its one annotation file, relative to this file
#   name        how messages and results call the dataset
#   format      how it is read
#   splits      which of the dataset's own splits are train, val and test
#   weight      how much of a batch it gets, relative to the others: with 2, twice as much as with 1
#   renames     name in the dataset's files: name here. Names that become equal are one category, in all datasets
#   prompts     name here: what the language model reads instead of it, such as   crane: a wading bird
#   exhaustive  the names (as they are here) that are annotated wherever they are to be seen. Take out those that were
#               annotated now and then: their absence is no longer taught. By default, what the format says, mostly all

datasets:
"""


def check_target(path: Path, force: bool) -> None:
    """Whether a listing may be written.

    Raises:
        ConfigError: no YAML file is named, or there is a file already (with `force`, one that is no listing).
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise ConfigError("a listing is a YAML file", where=path, hint=f"{path.with_suffix('.yaml')}")
    if not path.exists():
        return
    if not force:
        raise ConfigError("this file exists", where=path, hint="another name, or --force to write over it")
    if "datasets" not in read_yaml(path):
        what = "this file is no listing of datasets, and is not written over"
        raise ConfigError(what, where=path, hint="another name")


def write_datasets_file(
    path: Path, sources: Sequence[DatasetSource], suggestions: Sequence[Suggestion], coverage: Coverage
) -> None:
    """Writes the listing, its folder too where it is missing.

    Raises:
        OSError: the disk refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(listing_text(path, sources, suggestions, coverage), encoding="utf-8")


def listing_text(
    path: Path, sources: Sequence[DatasetSource], suggestions: Sequence[Suggestion], coverage: Coverage
) -> str:
    """The listing's text; `path` is where it will lie, which paths are relative to."""
    parts = [_HEAD.format(file=path.name)]
    for source in sources:
        mine = [suggestion for suggestion in suggestions if suggestion.dataset == source.name]
        parts.append("\n".join([*_told(source, coverage), *_entry(source, mine, path.parent), ""]))
    return "\n".join(parts)


def _told(source: DatasetSource, coverage: Coverage) -> list[str]:
    """What is known of a dataset, in comments above its entry."""
    images = ", ".join(f"{len(annotations):,} {split}" for split, annotations in source.splits.items())
    number = len(source.categories)
    lines = [f"  # {images} images; {number:,} name{'s' if number > 1 else ''}"]
    if source.config.exhaustive is None and _told_by_image(source):
        told = "its files say of each image what is annotated in it; `exhaustive` would hold for all images"
        lines.append(f"  # {told}")
    hinted = coverage.hinted(source.name)
    for name, cell in hinted[:_TOLD]:
        lines.append(f"  # perhaps standing there unlabelled: {name} ({'; '.join(hint.why for hint in cell.hints)})")
    if len(hinted) > _TOLD:
        lines.append(f"  # and {len(hinted) - _TOLD} more")
    return lines


def _entry(source: DatasetSource, suggestions: Sequence[Suggestion], folder: Path) -> list[str]:
    spec = source.config
    lines = [
        f"  - name: {_flow(spec.name)}",
        f"    path: {_flow(_relative(spec.path, folder))}",
        f"    format: {_flow(source.format)}",
        f"    weight: {_flow(spec.weight)}",
        *_splits(source),
    ]
    own_names = {plain_name(new): old for old, new in spec.renames.items()}
    renames = [(own_names.get(one.name, one.name), one) for one in suggestions if one.kind == "rename"]
    prompts = [(one.name, one) for one in suggestions if one.kind == "prompt"]
    lines += _mapping("renames", spec.renames, renames)
    lines += _mapping("prompts", spec.prompts, prompts)
    if spec.exhaustive is not None:
        return [*lines, *_list("exhaustive", spec.exhaustive, "")]
    return lines if _told_by_image(source) else [*lines, *_list("exhaustive", source.categories, "# ")]


def _told_by_image(source: DatasetSource) -> bool:
    return any(annotations.told_by_image for annotations in source.splits.values())


def _splits(source: DatasetSource) -> list[str]:
    """The splits as the user chose them; else, as a comment, those that were taken."""
    if source.config.splits is not None:
        chosen = {split: [own] if isinstance(own, str) else list(own) for split, own in source.config.splits.items()}
        return [f"    splits: {_flow(chosen)}"]
    own = sorted(recognise(source.config.path, source.format).splits)
    taken = {}
    for split in (TRAIN, VAL, TEST):
        meant = [name for name in own if canonical_split(name) == split]
        if split in source.splits and meant:
            taken[split] = split if split in meant else max(meant)
    # a part that was held out by chance is no split of the dataset's own
    return [f"    # splits: {_flow(taken)}"] if taken.keys() == source.splits.keys() else []


def _mapping(key: str, given: Mapping[str, str], suggested: Sequence[tuple[str, Suggestion]]) -> list[str]:
    """A mapping of names with what is given, and what is suggested behind "#"."""
    if not given and not suggested:
        return []
    lines = [f"    {key}:" if given else f"    # {key}:"]
    lines += [f"      {_flow(name)}: {_flow(value)}" for name, value in given.items()]
    for name, one in suggested:
        mark = "  # " if given else "#   "
        entry = f"{_flow(name)}: {_flow(one.value)}"
        lines.append(f"    {mark}{entry}  # {' '.join(one.why.split())}")
    return lines


def _list(key: str, names: Iterable[str], mark: str) -> list[str]:
    """A list of names over as many lines as it needs."""
    items = [f"{_flow(name)}," for name in names]
    text = f"[{' '.join(items)}".rstrip(",") + "]"
    lines = wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)
    return [f"    {mark}{key}: {lines[0]}", *(f"    {mark}  {line}" for line in lines[1:])]


def _flow(value: object) -> str:
    """A value as YAML writes it inside a line."""
    text = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, sort_keys=False, width=10**9)
    return text.strip()[1:-1]


def _relative(path: Path, folder: Path) -> str:
    """A path as seen from a folder, with slashes; the whole path where there is no way from one to the other."""
    whole = Path(os.path.abspath(path))  # noqa: PTH100  (`..` goes, symbolic links stay)
    try:
        return Path(os.path.relpath(whole, os.path.abspath(folder))).as_posix()  # noqa: PTH100
    except ValueError:  # another drive
        return whole.as_posix()
