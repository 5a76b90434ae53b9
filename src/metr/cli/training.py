"""The verbs that train: `metr train` and `metr finetune`. What they need is imported when they run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from metr.cli.output import output_console, say_names
from metr.cli.verbs import AllowEmpty, Offline, Overrides, Prompts, check_data, check_source, stay_offline
from metr.lost_output import lasting
from metr.training.signals import Stopped

if TYPE_CHECKING:
    from metr.training.parts import Outcome

__all__ = ["finetune", "train"]

# the exit code of an interrupted run, unless a signal gives another one; by it scripts tell that training is not done
_INTERRUPTED = 130
_RunsData = Annotated[
    list[str] | None,
    typer.Argument(
        help="Datasets: a folder, name=folder, hf:user/name on the hub, or a YAML file that lists some. "
        "--resume needs none.",
        metavar="DATA",
    ),
]
_RunToWrite = Annotated[Path, typer.Option("-o", "--out", help="The run folder to write.")]
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
_SameNames = Annotated[
    str,
    typer.Option(
        help="Take new names that seem to mean a trained one (RBC, rbc) as that one: yes, no, or ask. "
        "ask is no where there is no terminal."
    ),
]
_Resume = Annotated[
    bool, typer.Option("--resume", help="Go on where the run in OUT stopped, with its data and configuration.")
]
_Freeze = Annotated[str | None, typer.Option(help="none, half (of the backbone), backbone, or encoder (and backbone).")]
_PretrainedBackbone = Annotated[
    float | None,
    typer.Option(
        help="0 to 1: how much of the backbone's weights are those of its own pretraining (ImageNet's), the rest the "
        "detector's; by default 0.",
        metavar="SHARE",
    ),
]
_Rehearse = Annotated[list[str] | None, typer.Option(help="Old datasets, mixed in; may be repeated.", metavar="DATA")]
_Decorrelate = Annotated[
    bool, typer.Option("--decorrelate-names", help="First move new names that mean nearly the same from each other.")
]
_DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show datasets, steps and sizes; train nothing and write nothing.")
]


def train(
    data: _RunsData = None,
    *,
    out: _RunToWrite,
    size: Annotated[str | None, typer.Option(help="nano (by default), small, base or vit.")] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Begin with this detector and its names: a METR (run, checkpoint), a folder of transformers, a .pth "
            "of DINO, or a name on the hub: user/name, user/name@revision.",
            metavar="SOURCE",
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file laid over the recipe.")] = None,
    set_: Overrides = None,
    steps: _Steps = None,
    epochs: _Epochs = None,
    shots: _Shots = None,
    fraction: _Fraction = None,
    seed: _Seed = None,
    same_names: Annotated[
        str | None,
        typer.Option(
            help="With --from: take names that seem to mean one of its names (Person, person) as that one: yes, no, or "
            "ask (by default)."
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="With --from: the prompt for a name trained without it: trained (left out) or given (used)."),
    ] = None,
    allow_empty: AllowEmpty = False,
    offline: Offline = False,
    resume: _Resume = False,
    dry_run: _DryRun = False,
) -> None:
    """Train one detector on many datasets. Their labels are never merged by hand."""
    from metr.training.config import check_epochs, load_recipe, recipe_layers

    stay_offline(offline)
    overrides = _overrides(set_, **{"train.loop.steps": steps})
    with _resumable("train", out):
        # mistakes are found before torch is imported and data are opened
        check_epochs(epochs, overrides)
        if resume:
            _check_resumable(out, config, overrides, dry_run=dry_run)
        else:
            recipe_layers("metr train", config, overrides) if source else load_recipe(size or "nano", config, overrides)
            _check_named(data, "DATA", "name a dataset: metr train DATA -o RUN")
            check_data(data or ())
            if source is not None:
                check_source(source)
        from metr.training.train import plan
        from metr.training.train import train as run

        options: dict[str, Any] = {"epochs": epochs, "shots": shots, "fraction": fraction, "seed": seed}
        options |= {"allow_empty": allow_empty or None, "start": source, "same_names": same_names, "prompts": prompts}
        if dry_run:
            resumed = out if resume else None
            page = plan(data or None, config, size=size, overrides=overrides, resumed=resumed, **options)
            output_console().print(page, highlight=False, crop=False)
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
    _exit_if_interrupted(outcome)


def finetune(
    data: _RunsData = None,
    *,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="A METR (run, checkpoint), a folder of transformers, a .pth of DINO, or a name on the hub: user/name, "
            "user/name@revision. --resume needs none.",
            metavar="SOURCE",
        ),
    ] = None,
    out: _RunToWrite,
    config: Annotated[Path | None, typer.Option(help="A YAML file laid over the defaults.")] = None,
    set_: Overrides = None,
    steps: _Steps = None,
    epochs: _Epochs = None,
    freeze: _Freeze = None,
    pretrained_backbone: _PretrainedBackbone = None,
    shots: _Shots = None,
    fraction: _Fraction = None,
    seed: _Seed = None,
    rehearse: _Rehearse = None,
    rehearse_fraction: Annotated[
        float | None, typer.Option(help="Fraction of the training images that comes from them; by default 0.5.")
    ] = None,
    rehearse_evaluate: Annotated[
        list[str] | None, typer.Option(help="Old datasets, only evaluated before and after.", metavar="DATA")
    ] = None,
    same_names: _SameNames = "ask",
    prompts: Prompts = "trained",
    allow_empty: AllowEmpty = False,
    decorrelate_names: _Decorrelate = False,
    offline: Offline = False,
    resume: _Resume = False,
    dry_run: _DryRun = False,
) -> None:
    """Train a detector further on new data. Its names are new strings: nothing is begun anew."""
    from metr.training.config import check_epochs, check_rehearsal, finetune_layers

    stay_offline(offline)
    begun = {"train.freeze": freeze, "train.pretrained_backbone": pretrained_backbone}
    overrides = _overrides(set_, **{"train.loop.steps": steps}, **begun)
    options = {
        "config": config,
        "overrides": overrides,
        "epochs": epochs,
        "shots": shots,
        "fraction": fraction,
        "seed": seed,
        "rehearse": rehearse or None,
        "rehearse_fraction": rehearse_fraction,
        "rehearse_evaluate": rehearse_evaluate or None,
        "decorrelate_names": decorrelate_names or None,
        "allow_empty": allow_empty or None,
        "same_names": same_names,
        "prompts": prompts,
    }
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    console = output_console()
    with _resumable("finetune", out):
        # mistakes are found before torch is imported and data are opened
        check_epochs(epochs, overrides)
        finetune_layers(config, overrides)
        if resume:
            _check_resumable(out, config, overrides, dry_run=dry_run)
        else:
            _check_start(data, source, [*(rehearse or ()), *(rehearse_evaluate or ())])
            check_rehearsal(rehearse_fraction, rehearse or ())
        from metr.training import finetune as run

        if dry_run:
            page = run.finetune_plan(data or None, source, resumed_run=out if resume else None, **given)
            console.print(page, highlight=False, crop=False)
            return
        outcome = run.finetune(data or None, source, out, resume=resume, console=console, **given)
    _exit_if_interrupted(outcome.training)
    with lasting(console):
        say_names("it looks for", outcome.default_names, outcome.known, console)


def _overrides(given: list[str] | None, **options: object) -> list[str]:
    """What `--set` says, then what options of their own say of the same configuration."""
    return [*(given or []), *(f"{key}={value}" for key, value in options.items() if value is not None)]


def _check_resumable(out: Path, config: Path | None, overrides: list[str], *, dry_run: bool) -> None:
    """Checks that there is a run to go on with, and that nobody trains it; its plan may be looked at all the same.

    Raises:
        MetrError: there is none, its configuration does not fit, or another process trains it.
    """
    from metr.run_directory import RunDirectory
    from metr.training.resumed_recipe import resumed_recipe

    run = RunDirectory(out)
    resumed_recipe(run, config, overrides)
    if not dry_run:
        run.check_free()


def _check_start(data: list[str] | None, source: str | None, rehearsed: list[str]) -> None:
    """Checks that a fine-tuning says on what it trains and from what it begins, and that all of that exists.

    Raises:
        typer.BadParameter: one of them is missing.
        CheckpointError, ModelError: there is no such detector.
        DataError: there is no such dataset.
    """
    _check_named(data, "DATA", "name a dataset: metr finetune DATA --from SOURCE -o OUT")
    _check_named(source, "--from", "name a detector to begin with: metr finetune DATA --from SOURCE -o OUT")
    check_source(source or "")
    check_data([*(data or ()), *rehearsed])


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
        run = RunDirectory(out)
        how = run.how_to_go_on(verb) if run.resumable else left
        console.print(f"{stopped}. {how}", markup=False, highlight=False)
        raise typer.Exit(stopped.exit_code) from None


def _exit_if_interrupted(outcome: "Outcome") -> None:
    """Ends with the exit code of a run that was interrupted, which has said how to go on.

    Raises:
        typer.Exit: the run was interrupted.
    """
    if outcome.interrupted:
        raise typer.Exit(_INTERRUPTED if outcome.signal is None else 128 + outcome.signal)
