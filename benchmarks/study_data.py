"""The datasets whose licence lets their weights be published: their words, and what of coco_mini is used."""

import json
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import runner
from metr.config import read_yaml
from metr.data.joint import open_joint
from metr.errors import DataError
from runner import Study

DATASETS = ("aquarium", "bccd", "chess_pieces", "coco_mini", "doc_tables", "playing_cards")
"""The six that the first checkpoint was trained on."""
WORDS = runner.HERE / "words.yaml"
"""Other words for the names of datasets; profiles `thirty` are of these datasets beside `DATASETS`."""
PHOTOGRAPHS = "coco_mini"
NON_COMMERCIAL = frozenset({1, 2, 3})
"""COCO's numbers of the NonCommercial licences: their photographs stay out."""
ANNOTATIONS = "annotations/instances_*.json"


def every_licensed() -> tuple[str, ...]:
    """The names of all 25 datasets whose licence is stated."""
    return tuple(dict.fromkeys((*DATASETS, *read_yaml(WORDS))))


def with_words(study: Study, arguments: Sequence[str], words: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Datasets as METR's verbs take them, with the `synonyms` and `absent` words that `words` has for some of them.

    Synonyms that are a category of one of the datasets are left out: such names are different things to METR.
    """
    sources = open_joint(arguments).sources
    names = {name for source in sources for name in source.categories}
    result = []
    for argument, source in zip(arguments, sources, strict=True):
        own = words.get(source.name, {})
        synonyms = {
            name: tuple(word for word in several if word not in names)
            for name, several in own.get("synonyms", {}).items()
        }
        absent = tuple(word for word in own.get("absent", ()) if word not in source.categories)
        config = source.config.model_copy(update={"synonyms": synonyms, "absent": absent})
        result.append(runner.datasets_file(study, config) if own else argument)
    return result


def licensed_datasets(study: Study, names: Sequence[str]) -> list[str]:
    """Datasets as METR's verbs take them; of coco_mini a licensed copy beside the study's folder of runs.

    Raises:
        DataError: some of them are not in the study's folder of datasets.
    """
    data = dict(zip(names, study.datasets(names), strict=True))
    if PHOTOGRAPHS in data:
        copy = study.out.with_name(f"{study.out.name}-{PHOTOGRAPHS}")
        licensed_copy(study.data / PHOTOGRAPHS, copy)
        data[PHOTOGRAPHS] = f"{PHOTOGRAPHS}={copy}"
    return list(data.values())


def licensed_copy(source: Path, target: Path, left_out: Collection[int] = NON_COMMERCIAL) -> int:
    """Copies a COCO folder without the images of some licences; gives how many images are left.

    Args:
        source: A folder with `annotations/instances_SPLIT.json` and the images in `SPLIT`.
        target: Where to; images are hard links where the disk allows it. What is there is written over, at no moment
            missing: another process may read it.
        left_out: `license` numbers of images that stay out.

    Raises:
        DataError: there are no annotations.
    """
    files = sorted(source.glob(ANNOTATIONS))
    if not files:
        raise DataError(f"expected {ANNOTATIONS}", where=source)
    kept = 0
    for file in files:
        tree = json.loads(file.read_text(encoding="utf-8"))
        tree["images"] = [image for image in tree["images"] if image["license"] not in left_out]
        ids = {image["id"] for image in tree["images"]}
        tree["annotations"] = [one for one in tree["annotations"] if one["image_id"] in ids]
        split = file.stem.removeprefix("instances_")
        for folder in (target / "annotations", target / split):
            folder.mkdir(parents=True, exist_ok=True)
        for image in tree["images"]:
            link(source / split / image["file_name"], target / split / image["file_name"])
        _write(json.dumps(tree), target / "annotations" / file.name)
        kept += len(ids)
    return kept


def link(source: Path, target: Path) -> None:
    """Puts a file at another path of the same disk without copying it, or else copies it."""
    if target.exists() and target.samefile(source):
        return
    new = target.with_name(f".{target.name}.new")
    new.unlink(missing_ok=True)
    try:
        os.link(source, new)
    except OSError:  # another disk
        shutil.copy2(source, new)
    new.replace(target)


def _write(text: str, target: Path) -> None:
    """Writes a file that is there whole or not at all, unless it says just that: its date is part of its index."""
    if not target.is_file() or target.read_text(encoding="utf-8") != text:
        new = target.with_name(f".{target.name}.new")
        new.write_text(text, encoding="utf-8")
        new.replace(target)
