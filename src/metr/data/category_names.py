"""Which names of a dataset's files are its categories, and what they are called."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from metr.data.dataset_config import DatasetConfig
from metr.data.formats.base import plain_name
from metr.data.index.label_map import LabelMap
from metr.data.index.manifest import Manifest
from metr.data.records import DataIssue
from metr.errors import DataError, counted, did_you_mean

# Names, in lower case and with blanks between words, of regions where objects of any category may lie unlabelled.
_DO_NOT_CARE = frozenset(
    {"dontcare", "dont care", "don't care", "don\u2019t care", "do not care", "ignore"}
    | {f"{verb} {noun}" for verb in ("ignore", "ignored") for noun in ("region", "regions")}
)


def _says_nothing(name: str, config: DatasetConfig) -> bool:
    """Whether a category's name says that nothing is known where its boxes are. A user may rename it to a real one."""
    return re.sub(r"[ _-]+", " ", name.casefold()) in _DO_NOT_CARE and name not in config.renames


def kept_names(manifest: Manifest, config: DatasetConfig, notes: list[DataIssue]) -> list[str]:
    """The names of categories that can be detected.

    Left out are supercategories of others that have no box (category 0 of Roboflow's COCO files), names of points and
    lines alone, and names of regions where nothing is known.
    """
    heads = {parent for name, parent in manifest.parents.items() if parent != name}
    kept = []
    for name, count in zip(manifest.names, manifest.counts, strict=True):
        if count == 0 and name in heads:
            detail = f"{name!r} has no box and is only the supercategory of others: dropped"
            notes.append(DataIssue(kind="unused parent category", where="categories", detail=detail))
        elif _says_nothing(name, config):
            ignored = counted(count, "box is an ignored box", "boxes are ignored boxes")
            detail = f"{name!r} is no category: its {ignored} of every category"
            notes.append(DataIssue(kind="do-not-care regions", where="categories", detail=detail))
        elif name not in manifest.mentioned:
            kept.append(name)
    return kept


def label_map(manifest: Manifest, kept: Sequence[str], config: DatasetConfig, *, sort: bool) -> LabelMap:
    """The dataset's categories: the kept names after `renames`, equal ones joined, that the user reads.

    Boxes of ignored names become regions where nothing is known, those of other names that are not read are left out.

    Raises:
        DataError: there is no category, or `config` names one that is not there.
    """
    if not kept:
        raise DataError("no category: nothing is declared and no box has a name", where=config.path)
    _check_known(config.renames, kept, "renames", config)
    renamed = {name: plain_name(config.renames.get(name, name)) for name in kept}
    every = tuple(dict.fromkeys(renamed[name] for name in (sorted(kept) if sort else kept)))
    given = {"only": config.only or (), "drop": config.drop, "ignore": config.ignore}
    for key, names in given.items():
        _check_known(names, every, key, config)
    categories = tuple(filter(config.reads, every))
    if not categories:
        keys = [key for key, names in given.items() if names]
        what = "`only` is empty" if config.only == () else f"none is left by {' and '.join(f'`{key}`' for key in keys)}"
        raise DataError(f"no category is read: {what}", where=config.path, hint="leave one to be read")
    places = {name: place for place, name in enumerate(categories)}
    rows = np.array([places.get(renamed.get(name, ""), -1) for name in manifest.names], dtype=np.int64)
    _check_known(config.prompts, categories, "prompts", config)
    _check_known(config.synonyms, categories, "synonyms", config)
    _check_words(categories, config)
    _check_known(config.exhaustive or (), categories, "exhaustive", config)
    annotated = None if config.exhaustive is None else tuple(sorted(places[name] for name in set(config.exhaustive)))
    regions = tuple(
        row
        for row, name in enumerate(manifest.names)
        if _says_nothing(name, config) or renamed.get(name) in config.ignore
    )
    unknown = tuple(name for name in every if name not in places)
    return LabelMap(categories=categories, rows=rows, annotated=annotated, regions=regions, unknown_names=unknown)


def _check_words(categories: Sequence[str], config: DatasetConfig) -> None:
    """Stops where `synonyms` and `absent` contradict the names, each other or themselves."""
    meant: dict[str, str] = {name: name for name in categories}
    for name, words in config.synonyms.items():
        for word in words:
            if meant.setdefault(word, name) != name:
                kind = "which is a category" if word in categories else f"which means {meant[word]!r} too"
                hint = "take it out, or make one category of two names with `renames`"
                raise DataError(f"`synonyms` has {word!r} for {name!r}, {kind}", where=config.path, hint=hint)
    for word in config.absent:
        if word in meant:
            kind = "is a category" if word in categories else f"is a synonym of {meant[word]!r}"
            raise DataError(
                f"`absent` has {word!r}, which {kind} of this dataset", where=config.path, hint="take it out"
            )


def _check_known(
    names: Sequence[str] | Mapping[str, object], known: Sequence[str], key: str, config: DatasetConfig
) -> None:
    for name in names:
        if name not in known:
            what, hint = f"`{key}` names {name!r}, which is no category of this dataset", did_you_mean(name, known)
            if key != "renames" and (new := plain_name(config.renames.get(name, ""))):
                what = f"`{key}` names {name!r}, which `renames` of this dataset has renamed to {new!r}"
                hint = f"write {new!r} in its place: categories are meant after `renames`"
            elif key in {"prompts", "synonyms", "exhaustive"} and not config.reads(name):
                what, hint = f"`{key}` names {name!r}, which is not read here", "take it out, or read it"
            raise DataError(what, where=config.path, hint=hint)
