"""`metr complete`: datasets with the names of the others added. What the verb needs is imported when it runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, get_args

import typer

from metr.cli.output import output_console
from metr.cli.verbs import Offline, check_data, check_source, stay_offline
from metr.errors import ConfigError, did_you_mean

__all__ = ["complete"]


def complete(
    data: Annotated[
        list[str] | None,
        typer.Argument(
            help="Datasets: folders, name=folder, hf:user/name on the hub, or YAML files that list some.",
            metavar="DATA",
            show_default=False,
        ),
    ] = None,
    *,
    model: Annotated[str, typer.Option(help="A run folder, a checkpoint, or a name on the hub.", metavar="RUN")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Where everything goes: a folder that is not there yet.")],
    precision: Annotated[
        float, typer.Option(help="Precision of each name on the val split where it is annotated.", min=0.01, max=1)
    ] = 0.9,
    least_objects: Annotated[
        int, typer.Option(help="Objects in val that a name needs for its threshold to be told.", min=1)
    ] = 10,
    only: Annotated[
        str | None, typer.Option(help='Of the names of the datasets add only these: "penguin, shark".', metavar="NAMES")
    ] = None,
    names: Annotated[
        str | None,
        typer.Option(help='Names with thresholds of your own, of the datasets or new: "rust=0.5".', metavar="NAMES"),
    ] = None,
    splits: Annotated[
        str, typer.Option(help="Splits that are completed, of train, val, test; the others stay as they are.")
    ] = "train",
    for_new: Annotated[
        Path | None,
        typer.Option(help="Label the images of this folder; DATA tell only when a name is sure.", metavar="FOLDER"),
    ] = None,
    format_: Annotated[
        str | None,
        typer.Option("--format", help="With --for-new: coco, yolo, voc, labelme, cvat, label_studio or csv."),
    ] = None,
    copy: Annotated[bool, typer.Option("--copy", help="Copy images; by default they are hard links.")] = False,
    batch_size: Annotated[int, typer.Option(help="Images a step.", min=1)] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="One value of how it detects: inference.section.key=value; may be repeated."),
    ] = None,
    offline: Offline = False,
) -> None:
    """Add to each dataset the names of the others, where a detector is sure. Every dataset keeps its format."""
    from metr.inference.config import inference_config

    if format_ is not None and for_new is None:
        raise ConfigError("goes with --for-new only: datasets keep their format", where="--format", hint="leave it out")
    given = _given(names)
    if not data and (for_new is None or not given):
        hint = "metr complete DATA... --model RUN -o OUT"
        if for_new is not None:
            hint = 'datasets, which tell when a name is sure, or thresholds of your own: --names "rust=0.5"'
        raise ConfigError("expected datasets", where="DATA", hint=hint)
    inference = inference_config(set_ or (), batch_size=batch_size, postprocess={"max_detections": 300})
    stay_offline(offline)
    check_source(model)
    check_data(data or ())
    from metr.completion.complete import run_completion
    from metr.completion.prelabels import PreLabels, check_format
    from metr.completion.request import CompletionRequest
    from metr.completion.thresholds import CompletionConfig, SplitChoice
    from metr.data.export import Placement

    chosen = _splits(splits, get_args(SplitChoice))
    values = {"precision": precision, "least_objects": least_objects, "splits": chosen, "inference": inference}
    config = CompletionConfig.checked(values, where="complete")
    placement: Placement = "copy" if copy else "link"
    check_format(form := format_ or "coco")
    new = None if for_new is None else PreLabels(folder=for_new, format=form, placement=placement)
    request = CompletionRequest(
        data=tuple(data or ()),
        out=out,
        only=_listed(only or ""),
        given=given,
        new=new,
        placement=placement,
    )
    run_completion(model, request, config=config, device=device, console=output_console())


def _splits(asked: str, known: Sequence[str]) -> tuple[str, ...]:
    """The splits of a command line.

    Raises:
        ConfigError: one of them is none.
    """
    chosen = _listed(asked)
    if unknown := next((one for one in chosen if one not in known), None):
        what = f"expected train, val or test, found {unknown!r}"
        raise ConfigError(what, where="--splits", hint=did_you_mean(unknown, known))
    return chosen


def _listed(names: str) -> tuple[str, ...]:
    return tuple(filter(None, (name.strip() for name in names.split(","))))


def _given(names: str | None) -> dict[str, float]:
    """The thresholds of a command line, by name.

    Raises:
        ConfigError: one of them is no number.
    """
    found = {}
    for one in _listed(names or ""):
        name, equals, value = (part.strip() for part in one.rpartition("="))
        try:
            found[name] = float(value) if equals and name else float("nan")
        except ValueError:
            found[name] = float("nan")
        if found[name] != found[name]:
            what = f"expected NAME=SCORE, found {one!r}"
            raise ConfigError(what, where="--names", hint='"rust=0.5"; --only takes names without a score')
    return found
