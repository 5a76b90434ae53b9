"""The verbs of `metr` that use a detector, and the demo. What a verb needs is imported when it runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from metr.cli.output import output_console
from metr.cli.report import Compare, Html, check_compared, check_page_of, read_arms, write_page_of
from metr.errors import ConfigError
from metr.processes import in_main_process

__all__ = [
    "AllowEmpty",
    "BatchSize",
    "Data",
    "Device",
    "InferenceOverrides",
    "Offline",
    "Overrides",
    "Prompts",
    "Run",
    "Source",
    "check_data",
    "check_source",
    "demo",
    "evaluate",
    "push",
    "stay_offline",
    "transfer",
]

_TARGETS = "deformable_detr, dab_detr, conditional_detr, detr, rt_detr, rt_detr_v2, d_fine, deimv2, lw_detr or rf_detr"

Data = Annotated[
    list[str],
    typer.Argument(
        help="Datasets: a folder, name=folder, hf:user/name on the hub, or a YAML file that lists some.", metavar="DATA"
    ),
]
Run = Annotated[str, typer.Argument(help="A run folder, a checkpoint folder, or a name on the hub.", metavar="RUN")]
Source = Annotated[
    str,
    typer.Argument(
        help="A METR (run, checkpoint), a folder of transformers, a .pth of DINO, or a name on the hub: user/name, "
        "user/name@revision.",
        metavar="SOURCE",
    ),
]
Offline = Annotated[bool, typer.Option("--offline", help="Ask the hub for nothing: take what was downloaded before.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="One value of the recipe: section.key=value; may be repeated."),
]
InferenceOverrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="One value of how it detects: inference.section.key=value; may be repeated."),
]
BatchSize = Annotated[int, typer.Option(help="Images a step.", min=1)]
Prompts = Annotated[
    str,
    typer.Option(help="The prompt of a dataset for a name trained without it: trained (left out) or given (used)."),
]
AllowEmpty = Annotated[
    bool, typer.Option("--allow-empty", help="Use splits without a box, or of which most was lost while reading.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, ...")]


def evaluate(
    source: Source,
    data: Data,
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", help="Where results go; by default evaluation or evaluation-SPLIT, in SOURCE if it is a run."
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="The split, or all for every image; by default val (test where there is nothing to train on)."
        ),
    ] = None,
    prompts: Prompts = "trained",
    batch_size: BatchSize = 8,
    device: Device = "auto",
    set_: InferenceOverrides = None,
    store: Annotated[
        bool, typer.Option("--store", help="Keep calibration and thresholds of scores in the checkpoint, for detect.")
    ] = False,
    html: Html = False,
    compare: Compare = None,
    allow_empty: AllowEmpty = False,
    offline: Offline = False,
) -> None:
    """Measure average precision on datasets. Own names, the joint vocabulary, confusion between datasets."""
    from metr.inference.config import inference_config
    from metr.run_directory import find_checkpoint
    from metr.writable import check_folder_to_write

    compared = check_compared(compare, html)
    stay_offline(offline)
    check_source(source)
    check_data(data)
    run, metr = Path(source), _is_metr_here(source)
    if store and not metr:
        what = "calibration is kept in a METR on this machine, and this is none"
        hint = "keep one first: metr transfer --from SOURCE -o OUT; or download it"
        raise ConfigError(what, where="--store", hint=hint)
    inference = inference_config(set_ or (), batch_size=batch_size)
    if store and (cut := inference.postprocess.score_threshold):
        what = f"scores are fitted to all detections, and those below {cut:g} are to be left out"
        raise ConfigError(what, where="--store", hint="leave out --set inference.postprocess.score_threshold")
    values = {"prompts": prompts, "inference": inference}
    # what is no run is not written into
    folder = "evaluation" if split is None else f"evaluation-{split}"
    out = out or (run / folder if metr else Path(folder))
    check_folder_to_write(out)
    from metr.evaluation.results import EvaluationConfig, store_calibration
    from metr.evaluation.runner import evaluate_in_detail

    arms = read_arms(compared)
    if html:
        check_page_of(out)
    if store:
        check_folder_to_write(find_checkpoint(run))
    config = EvaluationConfig.checked(values, where="evaluate")
    console = output_console()
    detailed = evaluate_in_detail(
        source, data, out, split=split, device=device, config=config, allow_empty=allow_empty, console=console
    )
    if html:
        write_page_of(detailed, out, source, arms)
    if store and in_main_process():
        store_calibration(detailed.report, run, console)
        if split == "test":
            note = "scores were calibrated on test: there they now look better calibrated than they are"
            console.print(note, highlight=False, soft_wrap=True)


def check_source(source: str) -> None:
    """Checks that a detector is there, before torch is imported to load it. What may be on the hub is not asked for.

    Raises:
        CheckpointError: there is none.
    """
    from metr.sources import look_here

    look_here(source)


def check_data(data: Sequence[str], *, listed: bool = True) -> None:
    """Checks that datasets are there, as far as their paths tell, before torch is imported to read them.

    Args:
        data: The datasets of a command line.
        listed: Whether to look for those too that datasets files list.

    Raises:
        DataError: one is not.
    """
    from metr.data.formats.presence import check_datasets_there

    check_datasets_there(data, listed=listed)


def transfer(
    out: Annotated[Path, typer.Option("-o", "--out", help="Where the detector goes.")],
    run: Annotated[
        str | None, typer.Argument(help="A run folder, a checkpoint folder, or a name on the hub.", metavar="RUN")
    ] = None,
    *,
    to: Annotated[str | None, typer.Option(help=f"A detector of transformers: {_TARGETS}.")] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Make a METR of this: a folder of transformers, a name on the hub (user/name, user/name@revision), "
            "or a .pth of DINO or METR.",
        ),
    ] = None,
    names: Annotated[
        str | None,
        typer.Option(help='What it is to find: "penguin, shark", or a dataset; by default what it knows.'),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="With --from: the text encoder's folder or hub name; by default the bundled one."),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            help="Images of such things, without labels, that the result is fitted to: a folder, or a file that lists "
            "datasets; by default the training images of the dataset in --names."
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=0, help="Steps that teach the result what RUN finds in these images; by default 300, 0 for none."
        ),
    ] = None,
    offline: Offline = False,
) -> None:
    """Move weights to a detector of transformers, or from other detectors. Reports what becomes of every weight."""
    stay_offline(offline)
    if source is not None:
        if run is not None or to is not None:
            hint = "metr transfer --from SOURCE -o OUT"
            raise ConfigError("expected --from alone, without RUN and --to", where="--from", hint=hint)
        for option, value in {"--images": images, "--steps": steps}.items():
            if value is not None:
                what = "goes with --to only: what METR takes over needs no images"
                raise ConfigError(what, where=option, hint="leave it out")
        from metr.conversion.adoption import adopt_file

        adopt_file(source, out, names=names, text=text, console=output_console())
        return
    if run is None or to is None:
        hint = "metr transfer RUN --to rt_detr -o OUT, or metr transfer --from SOURCE -o OUT"
        raise ConfigError("expected RUN and --to", where="transfer", hint=hint)
    if text is not None:
        raise ConfigError("goes with --from only: a METR has its text encoder", where="--text", hint="leave it out")
    check_source(run)
    from metr.conversion.transfer import transfer as transfer_run

    transfer_run(run, to, out, names=names, images=images, steps=steps, console=output_console())


def stay_offline(offline: bool) -> None:
    """Keeps the command from asking the hub, if that is asked for."""
    if offline:
        from metr.hub import go_offline

        go_offline()


def _is_metr_here(source: str) -> bool:
    """Whether this is a METR on this machine: a run or a checkpoint, into which may be written."""
    from metr.sources import find_source

    return Path(source).is_dir() and find_source(source).kind == "metr"


def push(
    run: Run,
    name: Annotated[str, typer.Argument(help="The repository: user/name; made if it is missing.", metavar="NAME")],
    half: Annotated[bool, typer.Option("--half", help="Send float16 weights: half the size.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    licence: Annotated[
        str | None, typer.Option("--licence", "--license", help="The model's, as the hub calls it: apache-2.0, ...")
    ] = None,
    branch: Annotated[
        str | None, typer.Option(help="Of the repository, made if it is missing; by default main.")
    ] = None,
) -> None:
    """Share a detector on the Hugging Face hub. Sends weights and a model card; log in with `hf auth login` first."""
    check_source(run)
    import torch

    from metr.sharing.push import push as push_run

    dtype = torch.float16 if half else None
    place = push_run(run, name, dtype=dtype, licence=licence, private=private or None, branch=branch)
    output_console().print(f"{name} is shared: {place}", markup=False, highlight=False, soft_wrap=True)


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Where everything goes.")] = Path("demo"),
    set_: Overrides = None,
) -> None:
    """Try it all on synthetic images. Draws three small datasets, trains on them jointly, evaluates, detects."""
    from metr.demo.run import run_demo

    run_demo(out, output_console(), tuple(set_ or ()))
