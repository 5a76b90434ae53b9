"""The verbs of `metr`, all but `inspect`. What a verb needs is imported when it runs, so that help comes at once."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from metr.cli.output import output_console
from metr.errors import ConfigError
from metr.training.signals import Stopped

if TYPE_CHECKING:
    from metr.training.trainer import Outcome

__all__ = ["Data", "demo", "detect", "evaluate", "finetune", "push", "train", "transfer"]

# names that a line tells
_NAMES = 12
# the exit code of an interrupted run, unless a signal gives another one; by it scripts tell that training is not done
_INTERRUPTED = 130
_TARGETS = "deformable_detr, dab_detr, conditional_detr, detr, rt_detr, rt_detr_v2 or d_fine"

Data = Annotated[
    list[str],
    typer.Argument(help="Datasets: a folder, name=folder, or a YAML file that lists some.", metavar="DATA"),
]
_RunsData = Annotated[
    list[str] | None,
    typer.Argument(
        help="Datasets: a folder, name=folder, or a YAML file that lists some. --resume needs none.", metavar="DATA"
    ),
]
_Run = Annotated[Path, typer.Argument(help="A run folder, a checkpoint folder, or a name on the hub.", metavar="RUN")]
_RunToWrite = Annotated[Path, typer.Option("-o", "--out", help="The run folder to write.")]
_Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="One value of the recipe: section.key=value; may be repeated."),
]
_InferenceOverrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="One value of how it detects: inference.section.key=value; may be repeated."),
]
_Steps = Annotated[int | None, typer.Option(help="Training steps, in place of the recipe's.", min=1)]
_Epochs = Annotated[
    float | None, typer.Option(help="Passes over the training images, in place of --steps.", metavar="N")
]
_Shots = Annotated[
    int | None, typer.Option(help="Train on so few images that each category has K objects.", min=1, metavar="K")
]
_Fraction = Annotated[float | None, typer.Option(help="Train on this fraction of the images, 0 to 1.")]
_Seed = Annotated[
    int | None, typer.Option(help="Decides which images, and training's random numbers; by default 0.", min=0)
]
_Resume = Annotated[
    bool, typer.Option("--resume", help="Go on where the run in OUT stopped, with its data and configuration.")
]
_BatchSize = Annotated[int, typer.Option(help="Images a step.", min=1)]
_Prompts = Annotated[
    str,
    typer.Option(help="The prompt of a dataset for a name trained without it: trained (left out) or given (used)."),
]
_Device = Annotated[str, typer.Option(help="auto, cpu, cuda, ...")]


def train(
    data: _RunsData = None,
    *,
    out: _RunToWrite,
    size: Annotated[str | None, typer.Option(help="nano (by default), small or base.")] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file laid over the size's recipe.")] = None,
    set_: _Overrides = None,
    steps: _Steps = None,
    epochs: _Epochs = None,
    shots: _Shots = None,
    fraction: _Fraction = None,
    seed: _Seed = None,
    resume: _Resume = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show datasets, steps and sizes; train nothing and write nothing.")
    ] = False,
) -> None:
    """Train one detector on many datasets. Their labels are never merged by hand."""
    from metr.run_directory import RunDirectory
    from metr.training.config import check_epochs, load_recipe, resumed_recipe

    overrides = _overrides(set_, **{"train.loop.steps": steps})
    with _resumable("train", out):
        # mistakes are found before torch is imported and data are opened
        check_epochs(epochs, overrides)
        if resume:
            resumed_recipe(RunDirectory(out), config, overrides)
        else:
            load_recipe(size or "nano", config, overrides)
            _check_named(data, "DATA", "name a dataset: metr train DATA -o RUN")
        from metr.training.train import plan
        from metr.training.train import train as run

        options: dict[str, Any] = {"epochs": epochs, "shots": shots, "fraction": fraction, "seed": seed}
        if dry_run:
            resumed = out if resume else None
            page = plan(data or None, config, size=size, overrides=overrides, resumed=resumed, **options)
            output_console().print(page)
            return
        outcome = run(
            data or None,
            out,
            config,
            size=size,
            overrides=overrides,
            resume=resume,
            console=output_console(),
            **options,
        )
    _say_if_interrupted(outcome, out, "train")


def finetune(
    data: _RunsData = None,
    *,
    source: Annotated[
        str | None,
        typer.Option("--from", help="A run folder, a checkpoint folder, or a name on the hub. --resume needs none."),
    ] = None,
    out: _RunToWrite,
    config: Annotated[Path | None, typer.Option(help="A YAML file laid over the defaults.")] = None,
    set_: _Overrides = None,
    steps: _Steps = None,
    epochs: _Epochs = None,
    freeze: Annotated[
        str | None, typer.Option(help="none, half (of the backbone), backbone, or encoder (and backbone).")
    ] = None,
    shots: _Shots = None,
    fraction: _Fraction = None,
    seed: _Seed = None,
    rehearse: Annotated[
        list[str] | None, typer.Option(help="Old datasets, mixed in; may be repeated.", metavar="DATA")
    ] = None,
    rehearse_fraction: Annotated[
        float | None, typer.Option(help="Fraction of the training images that comes from them; by default 0.3.")
    ] = None,
    rehearse_evaluate: Annotated[
        list[str] | None, typer.Option(help="Old datasets, only evaluated before and after.", metavar="DATA")
    ] = None,
    same_names: Annotated[
        str,
        typer.Option(
            help="Take new names that seem to mean a trained one (RBC, rbc) as that one: yes, no, or ask. "
            "ask is no where there is no terminal."
        ),
    ] = "ask",
    prompts: _Prompts = "trained",
    decorrelate_names: Annotated[
        bool,
        typer.Option("--decorrelate-names", help="First move new names that mean nearly the same from each other."),
    ] = False,
    resume: _Resume = False,
) -> None:
    """Train a detector further on new data. Its names are new strings: nothing is begun anew."""
    from metr.run_directory import RunDirectory
    from metr.training.config import check_epochs, finetune_layers, resumed_recipe

    overrides = _overrides(set_, **{"train.loop.steps": steps, "train.freeze": freeze})
    options = {
        "config": config,
        "epochs": epochs,
        "shots": shots,
        "fraction": fraction,
        "seed": seed,
        "rehearse": rehearse or None,
        "rehearse_fraction": rehearse_fraction,
        "rehearse_evaluate": rehearse_evaluate or None,
        "decorrelate_names": decorrelate_names or None,
        "same_names": same_names,
        "prompts": prompts,
    }
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    with _resumable("finetune", out):
        # mistakes are found before torch is imported and data are opened
        check_epochs(epochs, overrides)
        finetune_layers(config, overrides)
        if resume:
            resumed_recipe(RunDirectory(out), config, overrides)
        else:
            _check_named(data, "DATA", "name a dataset: metr finetune DATA --from RUN -o OUT")
            _check_named(source, "--from", "name a detector to begin with: metr finetune DATA --from RUN -o OUT")
        from metr.training.finetune import finetune as run

        outcome = run(data or None, source, out, resume=resume, console=output_console(), overrides=overrides, **given)
    _say_if_interrupted(outcome.training, out, "finetune")
    _say_names("it looks for", outcome.default_names, outcome.known)


def evaluate(
    run: _Run,
    data: Data,
    *,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Where JSON, Markdown and chart go; by default evaluation, in RUN if local."),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="The split; by default val (test where there is nothing to train on).")
    ] = None,
    prompts: _Prompts = "trained",
    batch_size: _BatchSize = 8,
    device: _Device = "auto",
    set_: _InferenceOverrides = None,
    store: Annotated[
        bool, typer.Option("--store", help="Keep each name's best threshold in the checkpoint, for detect.")
    ] = False,
) -> None:
    """Measure average precision on datasets. Own names, the joint vocabulary, confusion between datasets."""
    from metr.evaluation.results import EvaluationConfig
    from metr.evaluation.runner import evaluate as run_evaluation
    from metr.evaluation.runner import store_thresholds
    from metr.inference.config import inference_config

    if store and not run.is_dir():
        raise ConfigError("a checkpoint on the hub cannot be changed", where="--store", hint="download it first")
    values = {"prompts": prompts, "inference": inference_config(set_ or (), batch_size=batch_size)}
    config = EvaluationConfig.checked(values, where="evaluate")
    # a name on the hub is no folder to write into
    out = out or (run / "evaluation" if run.is_dir() else Path("evaluation"))
    console = output_console()
    report = run_evaluation(run, data, out, split=split, device=device, config=config, console=console)
    if store:
        store_thresholds(report, run, console)


def detect(
    run: _Run,
    images: Annotated[list[Path], typer.Argument(help="Images, or folders of images.", metavar="IMAGE")],
    *,
    categories: Annotated[
        str | None,
        typer.Option(
            help='Names to look for, "penguin, shark"; "all": every trained name. By default the names of the last '
            "fine-tuning, or every one."
        ),
    ] = None,
    categories_file: Annotated[
        Path | None,
        typer.Option(help="Names to look for: one a line, or YAML that gives each name its phrases.", metavar="FILE"),
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Where drawn images and JSON go.")] = Path("detections"),
    threshold: Annotated[
        float | None,
        typer.Option(help="Least score; by default each name's own, to draw, and all for the JSON.", min=0, max=1),
    ] = None,
    nms: Annotated[
        float | None, typer.Option(help="IoU over which the weaker of two boxes of one name goes; 1: none.")
    ] = None,
    labels: Annotated[str, typer.Option(help="At drawn boxes: names (and scores), scores or none.")] = "names",
    batch_size: _BatchSize = 8,
    device: _Device = "auto",
    set_: _InferenceOverrides = None,
) -> None:
    """Find objects in images. Any names can be asked for, trained or not."""
    from metr.inference.config import inference_config
    from metr.inference.detect_files import check_labels, detect_files, names_to_find
    from metr.model import METR

    style, names = check_labels(labels), names_to_find(categories, categories_file)
    changes = {"score_threshold": threshold, "nms_iou": nms}
    config = inference_config(set_ or (), batch_size=batch_size, postprocess=changes)
    model = METR.from_pretrained(run, device=device)
    every = categories is not None and categories.strip() == "all"
    asked = model.names if every else model.default_names if names is None else names
    detect_files(
        model.predictor(asked, config),
        images,
        out,
        thresholds=model.thresholds(threshold),
        labels=style,
        console=output_console(),
    )
    _say_names("looked for", tuple(asked), len(model.names))


def transfer(
    out: Annotated[Path, typer.Option("-o", "--out", help="Where the detector goes.")],
    run: Annotated[
        Path | None, typer.Argument(help="A run folder, a checkpoint folder, or a name on the hub.", metavar="RUN")
    ] = None,
    to: Annotated[str | None, typer.Option(help=f"A detector of transformers: {_TARGETS}.")] = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", help="Make a METR of this: a folder of transformers, or a .pth of DINO or METR."),
    ] = None,
    names: Annotated[
        str | None,
        typer.Option(help='What it is to find: "penguin, shark", or a dataset; by default what it knows.'),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="With --from: the text encoder's folder or hub name; by default the bundled one."),
    ] = None,
) -> None:
    """Move weights to a detector of transformers, or from other detectors. Reports what becomes of every weight."""
    from metr.conversion.transfer import adopt_file
    from metr.conversion.transfer import transfer as transfer_run

    if source is not None:
        if run is not None or to is not None:
            hint = "metr transfer --from FOLDER -o OUT"
            raise ConfigError("expected --from alone, without RUN and --to", where="--from", hint=hint)
        adopt_file(source, out, names=names, text=text, console=output_console())
        return
    if run is None or to is None:
        hint = "metr transfer RUN --to rt_detr -o OUT, or metr transfer --from FOLDER -o OUT"
        raise ConfigError("expected RUN and --to", where="transfer", hint=hint)
    if text is not None:
        raise ConfigError("goes with --from only: a METR has its text encoder", where="--text", hint="leave it out")
    transfer_run(run, to, out, names=names, console=output_console())


def push(
    run: _Run,
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
    import torch

    from metr.sharing.push import push as push_run

    dtype = torch.float16 if half else None
    place = push_run(run, name, dtype=dtype, licence=licence, private=private or None, branch=branch)
    output_console().print(f"{name} is shared: {place}", markup=False, highlight=False, soft_wrap=True)


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Where everything goes.")] = Path("demo"),
    set_: _Overrides = None,
) -> None:
    """Try it all on synthetic images. Draws three small datasets, trains on them jointly, evaluates, detects."""
    from metr.demo.run import run_demo

    run_demo(out, output_console(), tuple(set_ or ()))


def _overrides(given: list[str] | None, **options: object) -> list[str]:
    """What `--set` says, then what options of their own say of the same configuration."""
    return [*(given or []), *(f"{key}={value}" for key, value in options.items() if value is not None)]


def _check_named(value: object, what: str, hint: str) -> None:
    """Checks that an argument is given which only --resume does without.

    Raises:
        typer.BadParameter: it is missing.
    """
    if not value:
        raise typer.BadParameter(f"it is missing, and only --resume needs none; {hint}", param_hint=what)


@contextmanager
def _resumable(verb: Literal["train", "finetune"], out: Path) -> Iterator[None]:
    """Ends a run that a signal stops between its steps in one line that says how to go on.

    Raises:
        typer.Exit: a signal came; with its exit code.
    """
    from metr.run_directory import RunDirectory

    try:
        yield
    except Stopped as stopped:
        console, left = output_console(stderr=True), "Nothing is saved yet: give the same command again."
        how = _how_to_go_on(verb, out) if RunDirectory(out).resumable else left
        console.print(f"{stopped}. {how}", markup=False, highlight=False)
        raise typer.Exit(stopped.exit_code) from None


def _how_to_go_on(verb: str, out: Path) -> str:
    return f"To go on:  metr {verb} --resume -o {shlex.quote(str(out))}"


def _say_if_interrupted(outcome: "Outcome", out: Path, verb: Literal["train", "finetune"]) -> None:
    """How to go on with a run that was interrupted.

    Raises:
        typer.Exit: the run was interrupted.
    """
    if outcome.interrupted:
        output_console().print(_how_to_go_on(verb, out), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(_INTERRUPTED if outcome.signal is None else 128 + outcome.signal)


def _say_names(what: str, names: tuple[str, ...], known: int) -> None:
    """Which names a detector looks for, and how to ask it for the rest of the `known` ones."""
    shown = ", ".join(names[:_NAMES]) + (f" and {len(names) - _NAMES} more" if len(names) > _NAMES else "")
    rest = "" if len(names) == known else f"; --categories all: all {known} names that it knows"
    output_console().print(f"{what}: {shown}{rest}", markup=False, highlight=False, soft_wrap=True)
