"""Completes datasets: every one comes out in its own format with the names of the others added (`metr complete`)."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.table import Table

from metr.completion.boxes import Wanted, box_rows, completed_record, counterparts, wanted_names
from metr.completion.datasets import AddedBoxes, Original, WrittenDataset, check_outside, original_of, write_completed
from metr.completion.journal import Journal, ToDetect, check_out, fingerprint, key_of
from metr.completion.prelabels import PreLabels, new_images, write_prelabels
from metr.completion.request import CompletedDataset, CompletionReport, CompletionRequest
from metr.completion.thresholds import (
    LEAST_SCORE,
    CompletionConfig,
    Judged,
    NameThreshold,
    best_of_places,
    given_thresholds,
    thresholds,
)
from metr.data.datasets_file import DatasetConfig, DatasetSource
from metr.data.images import exif_oriented_record
from metr.data.joint import open_joint
from metr.data.records import Annotations
from metr.errors import ConfigError, DataError, counted, did_you_mean
from metr.inference.calibrated_names import checked_calibrations
from metr.model import METR
from metr.run_directory import explained_disk_errors, replaced_file
from metr.text.vocabulary import Vocabulary

BOXES, SUMMARY, DATA = "completed.json", "summary.json", "data.yaml"
_KEPT = ("splits", "weight", "prompts", "renames", "boxes", "exhaustive", "only", "drop", "ignore", "format")


def complete(
    source: METR | str | Path,
    data: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    config: CompletionConfig | None = None,
    device: str | torch.device = "auto",
    console: Console | None = None,
    **more: Any,
) -> CompletionReport:
    """Adds the names of other datasets to each of some datasets, where a detector is sure of them.

        complete("runs/joint", ["photos/", "cells=old/voc"], "completed")
        complete("runs/joint", ["photos/", "cells=old/voc"], "completed", only=("red cell",), given={"rust": 0.5})
        complete("runs/joint", ["photos/"], "labelled", new=PreLabels(folder=Path("unlabelled"), format="cvat"))

    The threshold of a name is set on the val split of the datasets that annotate it. A dataset never gets a box of a
    name that it annotates. Nothing is written into the datasets: each one goes into a folder of its own in `out`,
    beside `completed.json` (every added box), `summary.json` and `data.yaml`, which lists them for training with the
    added names as not exhaustively annotated. What was found is kept on the way: the same call goes on where an earlier
    one was stopped.

    Args:
        source: A model, a checkpoint folder, a run folder, or a name on the hub.
        data: One dataset or several: folders, name=folder, or YAML files that list some.
        out: The folder where everything goes.
        config: The precision that is asked for, and how images go through the network.
        device: Where the network runs, if it is loaded here.
        console: Where progress and the table are shown; None shows none.
        **more: Fields of `CompletionRequest` by name: only, given, new, placement.

    Returns:
        The thresholds of all names, and what became of each dataset.

    Raises:
        DataError, ConfigError, CheckpointError: something is missing or does not fit.
    """
    request = CompletionRequest.of(data, out, more)
    return run_completion(source, request, config=config, device=device, console=console)


def run_completion(
    source: METR | str | Path,
    request: CompletionRequest,
    *,
    config: CompletionConfig | None = None,
    device: str | torch.device = "auto",
    console: Console | None = None,
) -> CompletionReport:
    """Does what `complete` does, for a request that is made already.

    Args:
        source: A model, a checkpoint folder, a run folder, or a name on the hub.
        request: The datasets, where they go, and which names.
        config: The precision that is asked for, and how images go through the network.
        device: Where the network runs, if it is loaded here.
        console: Where progress and the table are shown.

    Raises:
        DataError, ConfigError, CheckpointError: something is missing or does not fit.
    """
    config, console = config or CompletionConfig(), console or Console(quiet=True)
    check_out(request.out)
    sources = open_joint(request.data).sources if request.data else ()
    names = _names(sources, request)
    check_outside(request.out, [one.root for one in sources])
    new = () if request.new is None else new_images(request.new, request.out)
    model = source if isinstance(source, METR) else METR.from_pretrained(source, device=device)
    called = "METR" if isinstance(source, METR) else str(source)
    weights = fingerprint(model)
    journal = Journal(request.out, _task(sources, names, request, config, weights))
    if journal.done:
        console.print(f"goes on after {counted(journal.done, 'image')}", highlight=False)
    inference = checked_calibrations(config.inference, list(names), model.names, model.meant(list(names)))
    predictor = model.predictor(Vocabulary.of(names), inference)
    homes = _homes(sources) if any(name not in (request.given or {}) for name in names) else {}
    journal.detect(predictor, [one for images in homes.values() for one, _ in images], console)
    alike = {one.name: counterparts(one.categories, names, model) for one in sources if one.name in homes}
    sure = thresholds(_judged(homes, alike, journal, config), names, config) | given_thresholds(request.given or {})
    if request.new is not None:
        journal.detect(predictor, new, console)
        written_as = f"{called} {weights[:8]}"
        boxes, labelled = _prelabelled(request.new, new, journal, sure, written_as, request, config)
        done = [labelled]
    else:
        work = [_Work(one, original_of(one), model, sure, names, config) for one in sources]
        journal.detect(predictor, [one for item in work for _, _, one in item.images], console)
        written = [(item, *item.write(journal, request)) for item in work]
        boxes = [row for item, added, _ in written for row in item.rows(added)]
        done = [item.summary(added, result, journal) for item, added, result in written]
        _write_data(request.out, [result.config for _, _, result in written])
    report = CompletionReport(model=f"{called} {weights[:8]}", thresholds=tuple(sure.values()), datasets=tuple(done))
    _write(request.out, report, boxes)
    journal.close()
    _show(report, request.out, console)
    return report


def _names(sources: Sequence[DatasetSource], request: CompletionRequest) -> tuple[str, ...]:
    """The names that may be added.

    Raises:
        ConfigError: a wanted name is in no dataset, a threshold is none, or there is nothing to add.
    """
    given = request.given or {}
    for name, threshold in given.items():
        if not LEAST_SCORE <= threshold <= 1:
            what = f"expected a score of {LEAST_SCORE} to 1 for {name!r}, found {threshold:g}"
            raise ConfigError(what, where="--names", hint=f'"{name}=0.5"')
    known = list(dict.fromkeys(name for one in sources for name in one.categories))
    for name in request.only:
        if name not in known and name not in given:
            hint = did_you_mean(name, known) or 'a name of no dataset needs a threshold: --names "NAME=0.5"'
            raise ConfigError(f"{name!r} is a name of no dataset", where="--only", hint=hint)
    if request.new is None and len(sources) < 2 and not given:
        hint = 'name several, or a name with a threshold of your own: --names "NAME=0.5"'
        raise ConfigError("one dataset has no names of others to add", where="DATA", hint=hint)
    names = tuple(dict.fromkeys([*known, *given]))
    return tuple(name for name in names if not request.only or name in request.only or name in given)


def _task(
    sources: Sequence[DatasetSource],
    names: Sequence[str],
    request: CompletionRequest,
    config: CompletionConfig,
    weights: str,
) -> dict[str, Any]:
    """What detections depend on, and which images they are of: a completion goes on if all of it is as it was."""
    return {
        "names": list(names),
        "weights": weights,
        "inference": config.inference.model_dump(mode="json", exclude={"batch_size"}),
        "datasets": {one.name: [str(one.place), sum(map(len, one.splits.values()))] for one in sources},
        "new": None if request.new is None else str(request.new.folder),
    }


Home = list[tuple[ToDetect, DatasetSource]]


def _homes(sources: Sequence[DatasetSource]) -> dict[str, Home]:
    """The val images of each dataset: where a name is annotated, and where its boxes may lie on what is none."""
    homes: dict[str, Home] = {}
    for source in sources:
        try:
            _, annotations = source.evaluation_split()
        except DataError:
            continue  # its names have no val
        homes[source.name] = [(one, source) for one in _upright(source, annotations)]
    return homes


def _upright(source: DatasetSource, annotations: Annotations) -> list[ToDetect]:
    records = (exif_oriented_record(annotations[index]) for index in range(len(annotations)))
    return [ToDetect(key=key_of(source.name, source.root, record), record=record) for record in records]


def _judged(
    homes: Mapping[str, Home], alike: Mapping[str, Mapping[str, str]], journal: Journal, config: CompletionConfig
) -> Iterator[Judged]:
    """The val images that could be read, with what was found in the pixels that their boxes are in."""
    for name, images in homes.items():
        for one, source in images:
            found = journal[one.key]
            if found is not None:
                sides = np.array([one.record.width / found.size[1], one.record.height / found.size[0]] * 2)
                scaled = type(found)(
                    size=(one.record.height, one.record.width),
                    boxes=found.boxes * sides,
                    scores=found.scores,
                    labels=found.labels,
                )
                best = best_of_places(scaled, config.iou)
                yield Judged(record=one.record, categories=source.categories, found=best, alike=alike[name])


class _Work:
    """A dataset on its way to be completed."""

    def __init__(
        self,
        source: DatasetSource,
        original: Original | None,
        model: METR,
        sure: Mapping[str, NameThreshold],
        names: Sequence[str],
        config: CompletionConfig,
    ) -> None:
        self.source, self.original, self.config = source, original, config
        told = (*source.config.renames, *source.config.drop, *source.config.ignore)
        in_files = (*(() if original is None else original.names), *told)
        self.wanted: Wanted = wanted_names(source.categories, in_files, sure, names, model)
        chosen = [split for split in source.splits if split in config.splits] if self.wanted.rows else []
        self.images = [
            (split, index, one) for split in chosen for index, one in enumerate(_upright(source, source.splits[split]))
        ]

    def write(self, journal: Journal, request: CompletionRequest) -> tuple[list[AddedBoxes], WrittenDataset]:
        """Writes the dataset unless an earlier call has, and gives what was added."""
        added = []
        for split, index, one in self.images:
            found = journal[one.key]
            if found is not None:
                record = self.source.splits[split][index]
                more, names = completed_record(record, one.record, found, self.wanted, self.config.iou)
                added.append(AddedBoxes(split=split, index=index, record=more, names=names))
        folder = request.out / _folder_name(self.source.name)
        note = folder.with_name(f".{folder.name}.json")
        if folder.is_dir() and note.is_file():
            values = json.loads(note.read_text(encoding="utf-8"))
            config = DatasetConfig.checked({**values["config"], "path": request.out / values["config"]["path"]})
            return added, WrittenDataset(config=config, format=values["format"], why_coco=values["why_coco"])
        if folder.is_dir():
            raise DataError("there is a folder of this name", where=folder, hint="remove it, or name another -o")
        result = write_completed(self.source, self.original, added, folder, request.placement)
        values = {"config": _entry(result.config, request.out), "format": result.format, "why_coco": result.why_coco}
        note.write_text(json.dumps(values), encoding="utf-8")
        return added, result

    def rows(self, added: Sequence[AddedBoxes]) -> Iterator[dict[str, Any]]:
        """The rows of `completed.json`."""
        for one in added:
            path = one.record.path
            image = path.relative_to(self.source.root) if path.is_relative_to(self.source.root) else path
            yield from box_rows(self.source.name, one.split, image, one.record, one.names)

    def summary(self, added: Sequence[AddedBoxes], written: WrittenDataset, journal: Journal) -> CompletedDataset:
        """What became of the dataset."""
        return CompletedDataset(
            name=self.source.name,
            path=str(written.config.path),
            format=written.format,
            images=len(added),
            added=dict(Counter(name for one in added for name in one.names)),
            unread=sum(journal[one.key] is None for _, _, one in self.images),
            why_coco=written.why_coco,
        )


def _prelabelled(
    new: PreLabels,
    images: Sequence[ToDetect],
    journal: Journal,
    sure: Mapping[str, NameThreshold],
    model_version: str,
    request: CompletionRequest,
    config: CompletionConfig,
) -> tuple[list[dict[str, Any]], CompletedDataset]:
    """Writes labels of new images.

    Raises:
        DataError: none of them could be read.
    """
    out, names = request.out / _folder_name(new.name), list(sure)
    given = {row for row, name in enumerate(names) if name in (request.given or {})}
    seen = {one.key: journal[one.key] for one in images}
    found = {key: None if one is None else best_of_places(one, config.iou, given) for key, one in seen.items()}
    unread = sum(one is None for one in found.values())
    if unread == len(found):
        what = "none of its images could be read: nothing was written"
        raise DataError(what, where=new.folder, hint="the first ones are named above; open one in an image viewer")
    rows = write_prelabels(new, images, found, names, sure, out, model_version)
    added = dict(Counter(row["name"] for row in rows))
    count = len(images) - unread
    return rows, CompletedDataset(
        name=new.name, path=str(out), format=new.format, images=count, added=added, unread=unread
    )


def _folder_name(dataset: str) -> str:
    """The folder of a dataset: its name without what no file system takes."""
    plain = "".join("_" if sign in '<>:"/\\|?*' or ord(sign) < 32 else sign for sign in dataset).strip(". ")
    return plain or "dataset"


def _entry(config: DatasetConfig, out: Path) -> dict[str, Any]:
    """A dataset as `data.yaml` lists it, with its path relative to that file."""
    values = config.model_dump(mode="json", exclude_defaults=True)
    path = os.path.relpath(config.path, out)
    return {"name": config.name, "path": path, **{key: values[key] for key in _KEPT if key in values}}


def _write_data(out: Path, configs: Sequence[DatasetConfig]) -> None:
    told = "# Names that were added are not in `exhaustive`: where an image has none of them, nothing is known.\n"
    text = yaml.safe_dump(
        {"datasets": [_entry(one, out) for one in configs]}, allow_unicode=True, sort_keys=False, width=10_000
    )
    with explained_disk_errors(out), replaced_file(out / DATA) as fresh:
        fresh.write_text(told + text, encoding="utf-8")


def _write(out: Path, report: CompletionReport, boxes: Sequence[Mapping[str, Any]]) -> None:
    """Writes the summary and, where datasets were completed, every box that was added."""
    with explained_disk_errors(out), replaced_file(out / SUMMARY) as fresh:
        fresh.write_text(json.dumps(asdict(report), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    with explained_disk_errors(out), replaced_file(out / BOXES) as fresh:
        lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in boxes)
        head = json.dumps(report.model, ensure_ascii=False)
        fresh.write_text(f'{{"model": {head}, "boxes": [\n{lines}\n]}}\n', encoding="utf-8")
    for note in out.glob(".*.json"):
        note.unlink()


def _show(report: CompletionReport, out: Path, console: Console) -> None:
    """Prints a line for each name, and one for each dataset."""
    table = Table("name", "threshold", "precision", "found in val", "boxes added", box=None, header_style="bold")
    totals = Counter[str]()
    for one in report.datasets:
        totals.update(one.added)
    for name in report.thresholds:
        if name.threshold is not None:
            precision = "given" if name.precision is None else f"{name.precision:.3f}"
            found = "" if name.precision is None else f"{name.found} of {name.objects}"
            table.add_row(name.name, f"{name.threshold:.3f}", precision, found, str(totals[name.name]))
    if table.rows:
        console.print(table)
    for name in report.thresholds:
        if name.threshold is None:
            console.print(f"left out: {name.name}: {name.why}", markup=False, highlight=False, soft_wrap=True)
    for one in report.datasets:
        boxes = counted(sum(one.added.values()), "box", "boxes")
        told = f"{one.name}: {boxes} added, {counted(one.images, 'image')} looked at; as {one.format} in {one.path}"
        told += f" (not in its own format: {one.why_coco})" if one.why_coco else ""
        told += f"; {counted(one.unread, 'image')} could not be read" if one.unread else ""
        console.print(told, markup=False, highlight=False, soft_wrap=True)
    console.print(f"{SUMMARY} and {BOXES} are in {out}", markup=False, highlight=False, soft_wrap=True)
