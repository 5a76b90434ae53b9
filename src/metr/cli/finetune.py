"""`metr finetune`: a trained detector learns new data, and keeps what it knew as far as it is asked to."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from metr.cli.arguments import Data, Overrides
from metr.cli.outcome import say_done


def finetune(
    data: Data,
    *,
    source: Annotated[str, typer.Option("--from", help="A run folder, a checkpoint folder, or a name on the hub.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The run folder to write.")],
    config: Annotated[Path | None, typer.Option(help="A YAML file laid over the defaults.")] = None,
    set_: Overrides = None,
    steps: Annotated[int | None, typer.Option(help="Training steps, in place of the default.", min=1)] = None,
    freeze: Annotated[
        str | None, typer.Option(help="none, half (of the backbone), backbone, or encoder (and backbone).")
    ] = None,
    shots: Annotated[
        int | None, typer.Option(help="Train on so few images that each category has K objects.", min=1, metavar="K")
    ] = None,
    fraction: Annotated[float | None, typer.Option(help="Train on this fraction of the images, 0 to 1.")] = None,
    seed: Annotated[int, typer.Option(help="Decides which images, and training's random numbers.", min=0)] = 0,
    rehearse: Annotated[
        list[str] | None, typer.Option(help="Old datasets, mixed in; may be repeated.", metavar="DATA")
    ] = None,
    rehearse_fraction: Annotated[float, typer.Option(help="Fraction of the samples that goes to them, 0 to 1.")] = 0.3,
    rehearse_evaluate: Annotated[
        list[str] | None, typer.Option(help="Old datasets, evaluated before and after only.", metavar="DATA")
    ] = None,
    decorrelate_names: Annotated[
        bool,
        typer.Option("--decorrelate-names", help="First move new names that mean nearly the same from each other."),
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in OUT stopped.")] = False,
) -> None:
    """Train a detector further on new data. Its names are new strings: nothing is begun anew."""
    from metr.training.finetune import finetune as run

    overrides = [*(set_ or []), *([f"train.loop.steps={steps}"] if steps is not None else [])]
    overrides += [f"train.freeze={freeze}"] if freeze is not None else []
    outcome = run(
        data,
        source,
        out,
        resume=resume,
        console=Console(),
        config=config,
        overrides=overrides,
        shots=shots,
        fraction=fraction,
        seed=seed,
        rehearse=rehearse or (),
        rehearse_fraction=rehearse_fraction,
        rehearse_evaluate=rehearse_evaluate or (),
        decorrelate_names=decorrelate_names,
    )
    say_done(outcome.training, out)
