"""Writes a datasets file for a person to edit: settings in force as they are, suggestions as comments."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Literal

import yaml

from metr.config import read_yaml
from metr.data.datasets_file import DatasetSource
from metr.data.formats.base import plain_name
from metr.data.formats.registry import recognise
from metr.data.records import TEST, TRAIN, VAL, canonical_split
from metr.data.shards.addresses import is_address
from metr.errors import ConfigError, counted
from metr.inspection.coverage import Coverage, Homonym
from metr.inspection.facts import DatasetFacts
from metr.inspection.languages import ForeignNames
from metr.inspection.similar_names import SimilarNames
from metr.text.similar_names import is_abbreviation, words
from metr.writable import check_file_to_write

# Contains a vowel, or has at most two letters (tv).
_SPEAKABLE = re.compile(r"[aeiouy]|^[a-z]{1,2}$")


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """A rename or a prompt of one name of a dataset, and why."""

    kind: Literal["rename", "prompt"]
    dataset: str
    name: str
    value: str
    why: str


def suggestions_of(
    facts: Sequence[DatasetFacts],
    near: Sequence[SimilarNames],
    homonyms: Sequence[Homonym],
    foreign: Sequence[ForeignNames] = (),
) -> tuple[Suggestion, ...]:
    """At most one suggestion a name: merge it with a similar name, keep it apart, or give it a prompt.

    Of two similar names the one with more boxes stays; of an abbreviation and its meaning, the meaning.
    """
    found: dict[tuple[str, str], Suggestion] = {}
    boxes: dict[str, int] = {}
    for one in facts:
        for name, category in one.names.items():
            boxes[name] = boxes.get(name, 0) + category.count
    for suggestion in (*_translated(foreign), *_kept_apart(homonyms), *_joined(near, boxes), *_written_out(facts)):
        found.setdefault((suggestion.dataset, suggestion.name), suggestion)
    return tuple(found.values())


def prompts_line(names: Sequence[str]) -> str:
    """The line of a datasets file that says in English what some names mean, for a person to fill in."""
    return f"prompts: {_flow(dict.fromkeys(names, 'in English'))}"


def is_cryptic(name: str) -> bool:
    """Whether a language model can hardly know what a name means: capitals, numbers or consonants only."""
    letters = "".join(words(name))
    return is_abbreviation(name) or letters.isdigit() or (letters.isascii() and not _SPEAKABLE.search(letters))


def _translated(foreign: Sequence[ForeignNames]) -> list[Suggestion]:
    why = "say it in English, for the bundled language model"
    return [
        Suggestion(kind="prompt", dataset=one.dataset, name=name, value=name, why=why)
        for one in foreign
        for name in one.names
    ]


def _kept_apart(homonyms: Sequence[Homonym]) -> list[Suggestion]:
    """Equal names need a rename to become two categories; for unequal names a prompt is enough."""
    found = []
    for homonym in homonyms:
        why = f"not the same as {', '.join(homonym.others)} of {homonym.other}? say what it is"
        kind: Literal["rename", "prompt"] = "rename" if homonym.equal else "prompt"
        value = f"{homonym.name} ({' '.join(words(homonym.dataset)) or homonym.dataset})"
        found.append(Suggestion(kind=kind, dataset=homonym.dataset, name=homonym.name, value=value, why=why))
    return found


def _joined(near: Sequence[SimilarNames], boxes: dict[str, int]) -> list[Suggestion]:
    found = []
    for pair in near:
        goes = _that_goes(pair, boxes)
        old, new = pair.names[goes], pair.names[1 - goes]
        why = f"{pair.why}: one category?"
        found += [
            Suggestion(kind="rename", dataset=dataset, name=old, value=new, why=why) for dataset in pair.owners[goes]
        ]
    return found


def _that_goes(pair: SimilarNames, boxes: dict[str, int]) -> int:
    """Which of two similar names is to be renamed to the other, 0 or 1."""
    one, two = pair.names
    if pair.kind == "abbreviation":
        return 0 if is_abbreviation(one) else 1
    return 0 if pair.kind == "detector" or boxes[one] < boxes[two] else 1


def _written_out(facts: Sequence[DatasetFacts]) -> list[Suggestion]:
    why = "write out what it stands for"
    return [
        Suggestion(kind="prompt", dataset=one.name, name=name, value=name, why=why)
        for one in facts
        for name in one.names
        if is_cryptic(name)
    ]


_WIDTH = 110
_SUFFIXES = (".yaml", ".yml")
# Most names that are listed above a dataset as perhaps unlabelled.
_REPORTED = 5

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
#   boxes       how the files of coco, csv, imagefolder and huggingface write boxes, where it is not recognised:
#               xywh, xyxy or cxcywh, with an n behind (xyxyn) as fractions of the image, with a % as per cent of it
#   weight      how much of a batch it gets, relative to the others: with 2, twice as much as with 1
#   renames     name in the dataset's files: name here. Names that become equal are one category, in all datasets
#   prompts     name here: what the language model reads instead of it, such as   crane: a wading bird
#   synonyms    name here: [other words for it], by which training calls it now and then
#   absent      words for what none of its images shows: training learns to say no to them
#   exhaustive  the names (as they are here) that are annotated wherever they are to be seen. Take out those that were
#               annotated now and then: their absence is no longer taught. By default, what the format says, mostly all

datasets:
"""


def check_target(path: Path, force: bool) -> None:
    """Checks that a datasets file may be written to `path`.

    Raises:
        ConfigError: `path` is no YAML file, or exists (with `force`: exists and is no datasets file).
        CheckpointError: it cannot be written.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise ConfigError("a datasets file ends in .yaml", where=path, hint=f"{path.with_suffix('.yaml')}")
    check_file_to_write(path)
    if not path.exists():
        return
    if not force:
        raise ConfigError("this file exists", where=path, hint="choose another name, or --force to overwrite it")
    if "datasets" not in read_yaml(path):
        what = "this file is no datasets file, and is not overwritten"
        raise ConfigError(what, where=path, hint="another name")


def write_datasets_file(
    path: Path, sources: Sequence[DatasetSource], suggestions: Sequence[Suggestion], coverage: Coverage
) -> None:
    """Writes the datasets file; makes its folder if missing.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(datasets_file_text(path, sources, suggestions, coverage), encoding="utf-8")


def datasets_file_text(
    path: Path, sources: Sequence[DatasetSource], suggestions: Sequence[Suggestion], coverage: Coverage
) -> str:
    """The text of the datasets file; paths in it are relative to the folder of `path`."""
    parts = [_HEAD.format(file=path.name)]
    for source in sources:
        mine = [suggestion for suggestion in suggestions if suggestion.dataset == source.name]
        parts.append("\n".join([*_comments(source, coverage), *_entry(source, mine, path.parent), ""]))
    return "\n".join(parts)


def _comments(source: DatasetSource, coverage: Coverage) -> list[str]:
    """Facts and hints about a dataset, as comments above its entry."""
    images = ", ".join(f"{len(annotations):,} {split}" for split, annotations in source.splits.items())
    number = len(source.categories)
    lines = [f"  # images: {images}; {counted(number, 'name')}"]
    if source.config.exhaustive is None and _told_by_image(source):
        told = "its files say of each image what is annotated in it; `exhaustive` would hold for all images"
        lines.append(f"  # {told}")
    hinted = coverage.hinted(source.name)
    for name, cell in hinted[:_REPORTED]:
        lines.append(f"  # perhaps unlabelled there: {name} ({'; '.join(hint.why for hint in cell.hints)})")
    if len(hinted) > _REPORTED:
        lines.append(f"  # and {len(hinted) - _REPORTED} more")
    return lines


def _entry(source: DatasetSource, suggestions: Sequence[Suggestion], folder: Path) -> list[str]:
    spec = source.config
    lines = [
        f"  - name: {_flow(spec.name)}",
        f"    path: {_flow(_relative(spec.path, folder))}",
        f"    format: {_flow(source.format)}",
        *([] if spec.boxes is None else [f"    boxes: {_flow(spec.boxes)}"]),
        f"    weight: {_flow(spec.weight)}",
        *_splits(source),
    ]
    own_names = {plain_name(new): old for old, new in spec.renames.items()}
    renames = [(own_names.get(one.name, one.name), one) for one in suggestions if one.kind == "rename"]
    prompts = [(one.name, one) for one in suggestions if one.kind == "prompt"]
    lines += _mapping("renames", spec.renames, renames)
    lines += _mapping("prompts", spec.prompts, prompts)
    if spec.synonyms:
        lines.append(f"    synonyms: {_flow({name: list(words) for name, words in spec.synonyms.items()})}")
    for key, names in (("absent", spec.absent), ("only", spec.only), ("drop", spec.drop), ("ignore", spec.ignore)):
        lines += _list(key, names, "") if names else []
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
    # a part held out at random is not among the dataset's own splits
    return [f"    # splits: {_flow(taken)}"] if taken.keys() == source.splits.keys() else []


def _mapping(key: str, given: Mapping[str, str], suggested: Sequence[tuple[str, Suggestion]]) -> list[str]:
    """A mapping of names: given entries as they are, suggested ones as comments."""
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


def _relative(path: Path | str, folder: Path) -> str:
    """A path as seen from a folder, with slashes; the whole path where there is no way there; an address as it is."""
    if is_address(path):
        return str(path)
    whole = Path(os.path.abspath(path))  # noqa: PTH100  (`..` goes, symbolic links stay)
    try:
        return Path(os.path.relpath(whole, os.path.abspath(folder))).as_posix()  # noqa: PTH100
    except ValueError:  # another drive
        return whole.as_posix()
