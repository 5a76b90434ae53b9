"""What is fitted to the scores of names, calibration and thresholds, once training has changed the weights."""

import shlex
from collections.abc import Sequence

from metr.checkpoint import Checkpoint, find_checkpoint, load_checkpoint, update_detection
from metr.evaluation.results import EvaluationReport, fitted_scores
from metr.fitting import Hanging
from metr.processes import in_main_process
from metr.run_directory import RunDirectory
from metr.training.parts import Outcome

_NAMED = 6  # datasets in a message


def keep_fitted(report: EvaluationReport, run: RunDirectory, outcome: Outcome) -> None:
    """Keeps what an evaluation of a run's best checkpoint fitted to all names, in the main process.

    The last checkpoint gets it too where it has the same weights.

    Raises:
        CheckpointError: a checkpoint cannot be written.
    """
    if not in_main_process():
        return
    folders = {find_checkpoint(run.path)}
    if outcome.best_step == outcome.step:
        folders.add(find_checkpoint(run.last))
    kept = {folder: load_checkpoint(folder) for folder in folders}
    found = fitted_scores(report, next(iter(kept.values())).vocabulary.names)  # all of the run have the same
    for folder, one in kept.items():
        update_detection(folder, one.detection.calibrated(*found))


def lost_fits(own: Checkpoint, run: RunDirectory) -> list[Hanging]:
    """A line on names that had something fitted to the weights that a run began with, and have nothing after it.

    Args:
        own: The checkpoint that the run began with.
        run: The run, which has ended.
    """
    if not in_main_process():
        return []
    before, after = own.detection, load_checkpoint(run.path).detection
    lost = (before.calibration.keys() - after.calibration.keys()) | (before.thresholds.keys() - after.thresholds.keys())
    if not lost:
        return []
    owners = [name for name, names in own.vocabulary.datasets.items() if not lost.isdisjoint(names)]
    what = f"{len(lost):,} of the checkpoint's names, of {_joined(owners)}," if owners else f"{len(lost):,} names"
    verb, command = "loses" if len(lost) == 1 else "lose", f"metr evaluate {shlex.quote(str(run.path))} DATASET --store"
    which = "which fitted the old weights; to fit them anew"
    return [Hanging(f"{what} {verb} calibration and threshold, {which}: {command}")]


def _joined(names: Sequence[str]) -> str:
    """Names of datasets as people list them; of many, the first ones."""
    if len(names) > _NAMED:
        names = [*names[: _NAMED - 1], f"{len(names) - _NAMED + 1} more datasets"]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
