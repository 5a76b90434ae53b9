"""`metr serve`: a detector that answers over HTTP."""

from typing import TYPE_CHECKING, Annotated

import typer

from metr.cli.output import output_console
from metr.cli.verbs import BatchSize, Device, InferenceOverrides, Offline, Run, check_source, stay_offline

if TYPE_CHECKING:
    from metr.model import METR

__all__ = ["serve"]


def serve(
    source: Run,
    *,
    host: Annotated[
        str, typer.Option(help="The address to listen at; 127.0.0.1: this machine alone, 0.0.0.0: everyone.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port; 0 takes a free one.", min=0, max=65_535)] = 8000,
    max_megabytes: Annotated[float, typer.Option(help="Largest image file, in millions of bytes.", min=0)] = 16,
    max_requests: Annotated[int, typer.Option(help="Most requests in progress; others are told to wait.", min=1)] = 32,
    timeout: Annotated[float, typer.Option(help="Seconds after which a request is given up.", min=0)] = 30,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    set_: InferenceOverrides = None,
    offline: Offline = False,
) -> None:
    """Answer over HTTP what is in images. A page for people, JSON for programs; needs the extra `serve`."""
    from metr.inference.config import inference_config
    from metr.serving.config import ServeConfig
    from metr.serving.run import check_dependencies
    from metr.serving.run import serve as run_server

    inference = inference_config(set_ or (), batch_size=batch_size)
    values = {
        "host": host,
        "port": port,
        "max_megabytes": max_megabytes,
        "max_requests": max_requests,
        "timeout": timeout,
    }
    config = ServeConfig.checked(values, where="serve")
    check_dependencies()
    stay_offline(offline)
    check_source(source)

    def load() -> "METR":
        from metr.model import METR

        return METR.from_pretrained(source, device=device)

    run_server(load, inference, config, console=output_console())
