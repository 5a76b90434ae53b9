"""`metr push`: a checkpoint becomes a repository of the hub."""

from typing import Annotated

import typer
from rich.console import Console

from metr.cli.arguments import Run


def push(
    run: Run,
    name: Annotated[str, typer.Argument(help="The repository: user/name; made if it is missing.")],
    half: Annotated[bool, typer.Option("--half", help="Send float16 weights: half the size.")] = False,
    private: Annotated[bool, typer.Option("--private", help="A new repository is for you alone.")] = False,
    licence: Annotated[
        str | None, typer.Option("--licence", "--license", help="The model's, as the hub calls it: apache-2.0, ...")
    ] = None,
    branch: Annotated[str | None, typer.Option(help="Of the repository, made if missing; by default main.")] = None,
) -> None:
    """Share a detector on the Hugging Face hub. Sends weights and a model card; log in with `hf auth login` first."""
    import torch

    from metr.model import METR

    model = METR.from_pretrained(run, device="cpu")
    options = {} if branch is None else {"branch": branch}
    dtype = torch.float16 if half else None
    place = model.push_to_hub(name, dtype=dtype, licence=licence, private=private or None, **options)
    Console().print(f"{name} is shared: {place}", markup=False, highlight=False, soft_wrap=True)
