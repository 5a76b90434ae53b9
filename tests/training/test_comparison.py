"""What is said of a fine-tuned detector beside the one that it began with."""

from io import StringIO

import pytest
from rich.console import Console

from metr.evaluation.results import EvaluationReport
from metr.training.comparison import Change, Comparison, show_comparison
from metr.training.finetune_data import Role


def said(role: Role, before: float | None, after: float | None) -> str:
    change = Change(
        dataset="cells",
        role=role,
        before={"own": before, "default": before, "joint": before},
        after={"own": after, "default": after, "joint": after},
    )
    nothing = EvaluationReport(datasets=(), names=0)
    console = Console(width=80, file=StringIO(), record=True)
    show_comparison(Comparison(changes=(change,), before=nothing, after=nothing), console)
    return console.export_text()


def test_a_new_dataset_that_was_found_better_before_is_said() -> None:
    assert "cells was found better before: AP 40.0, now 35.5." in said("new", 40.0, 35.5)


@pytest.mark.parametrize(
    ("role", "before", "after"),
    [("new", 35.5, 40.0), ("new", None, 40.0), ("new", 40.0, None), ("rehearsed", 40.0, 35.5)],
)
def test_otherwise_there_is_no_advice(role: Role, before: float | None, after: float | None) -> None:
    assert "found better before" not in said(role, before, after)
