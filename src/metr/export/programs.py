"""From a detector to torch's exported program, and from that to an ONNX model."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from metr.errors import ModelError
from metr.export.graph import OUTPUTS, ExportedDetector, Interface, example_inputs

OPSET = 20
"""Of ONNX."""
_MOST_MULTIPLES = 256


@torch.no_grad()
def exported_program(graph: ExportedDetector) -> ExportedProgram:
    """The detector as one graph of torch's operators; the number of images is free.

    Raises:
        ModelError: a part of the network cannot be captured.
    """
    interface = graph.interface
    example = example_inputs(interface)
    images, *others = dynamic_shapes(interface)
    try:
        with _quiet():
            shapes = (images, tuple(others)) if others else (images,)
            return torch.export.export(graph.eval(), example, dynamic_shapes=shapes)
    except Exception as error:  # torch's tracer fails in many ways
        raise _uncaptured(graph, error) from error


def dynamic_shapes(interface: Interface) -> list[dict[int, Any]]:
    """Which axes of each input are free: images, and where shapes are free also rows and columns."""
    batch = Dim("batch", min=1)
    shapes: list[dict[int, Any]] = [{0: batch}]
    if interface.shape is None:
        rows, columns = (interface.multiple * Dim(axis, min=1, max=_MOST_MULTIPLES) for axis in ("rows", "columns"))
        shapes = [{0: batch, 2: rows, 3: columns}, {0: batch}]
    return shapes if interface.names is None else [*shapes, {}, {}]


def write_onnx(program: ExportedProgram, interface: Interface, path: Path) -> None:
    """Writes a program as an ONNX model in one file.

    Raises:
        ModelError: an operator has no counterpart in ONNX.
    """
    try:
        with _quiet():
            converted = torch.onnx.export(
                program,
                dynamo=True,
                optimize=True,
                verbose=False,
                opset_version=OPSET,
                input_names=list(interface.inputs),
                output_names=list(OUTPUTS),
            )
            assert converted is not None
            converted.save(str(path), external_data=False)
    except Exception as error:  # and so does its converter
        what = f"this network cannot be written as ONNX: {_first_line(error)}"
        raise ModelError(what, where="--format", hint="--format torch writes it for PyTorch") from error


def write_torch(program: ExportedProgram, path: Path) -> None:
    """Writes a program as `torch.export.load` reads it."""
    with _quiet():
        torch.export.save(program, str(path))


def _uncaptured(graph: ExportedDetector, error: Exception) -> ModelError:
    config = graph.network.config
    parts = f"backbone {config.backbone.name}, encoder {config.encoder.kind}, decoder {config.decoder.kind}"
    what = f"this network cannot be exported ({parts}): {_first_line(error)}"
    return ModelError(what, where="metr export", hint="detect with METR itself, or metr transfer it to a detector")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress and no warnings of torch's exporters: they speak to their developers."""
    noisy = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in noisy]
    for logger in noisy:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)


def outputs_of(graph: ExportedDetector, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What the graph answers in torch."""
    with torch.inference_mode():
        answer: tuple[Tensor, ...] = graph(*inputs)
    return answer
