"""metrics.jsonl: one JSON a logged step or evaluation, written, read back, and shown to TensorBoard if wished."""

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from metr.errors import DependencyError, MetrError
from metr.run_directory import explained_disk_errors

Record = dict[str, Any]
Kind = Literal["train", "evaluation"]
_logger = logging.getLogger(__name__)


class MetricsWriter:
    """Appends records to metrics.jsonl, and their numbers to TensorBoard's event files.

    Args:
        path: The file; its folder is made.
        tensorboard: The folder of event files, or None for none.

    Raises:
        DependencyError: TensorBoard is asked for and not installed.
        CheckpointError: the folder cannot be made.
    """

    def __init__(self, path: Path, tensorboard: Path | None = None) -> None:
        self.path = path
        with explained_disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._board = None if tensorboard is None else _summary_writer(tensorboard)

    def rewind(self, step: int, evaluated_step: int) -> None:
        """Forgets steps after `step`, evaluations after `evaluated_step`, and a line that a crash cut short."""
        newest = {"train": step, "evaluation": evaluated_step}
        kept = [record for record in read_metrics(self.path) if record["step"] <= newest.get(record["kind"], step)]
        fresh = self.path.with_name(f".{self.path.name}.new")
        with explained_disk_errors(self.path):
            fresh.write_text("".join(map(_line, kept)), encoding="utf-8")
            fresh.replace(self.path)

    def write(self, kind: Kind, step: int, values: Mapping[str, Any]) -> None:
        """Appends one record; numbers that are not finite become null."""
        record = {"kind": kind, "step": step, **values}
        with explained_disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(_line(record))
        if self._board is not None:
            for name, value in _numbers(values, kind):
                self._board.add_scalar(name, value, step)
            self._board.flush()

    def close(self) -> None:
        """Closes the event files."""
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[Record]:
    """The records of a metrics.jsonl, or of the run folder that holds one, in the order of their writing.

    A last line that was cut short is left out. A missing file has no records.

    Raises:
        MetrError: another line is no record.
    """
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records.append({**record, "kind": str(record["kind"]), "step": int(record["step"])})
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                _logger.warning("%s: the last line was cut short and is left out", path)
                break
            hint = "remove the line"
            raise MetrError(f"line {number} is no record: {error}", where=path, hint=hint) from None
    return records


def grouped_terms(terms: Mapping[str, float]) -> dict[str, float]:
    """Loss terms summed over layers and blocks: `decoder.0/l1` and `decoder.1/l1` are `decoder/l1`."""
    groups: dict[str, float] = {}
    for name, value in terms.items():
        group = re.sub(r"/\d+$", "", re.sub(r"\.\d+(?=/|$)", "", name))
        groups[group] = groups.get(group, 0.0) + value
    return groups


def _line(record: Record) -> str:
    return json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(values: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, float]]:
    """Every number of a nested mapping, with its path."""
    for name, value in values.items():
        path = f"{prefix}/{name}"
        if isinstance(value, Mapping):
            yield from _numbers(value, path)
        elif isinstance(value, int | float):
            yield path, float(value)


def _summary_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        what = "TensorBoard is asked for and not installed"
        hint = "pip install 'metr[tensorboard]', or leave loop.tensorboard off"
        raise DependencyError(what, where="loop.tensorboard", hint=hint) from None
    return SummaryWriter(folder)
