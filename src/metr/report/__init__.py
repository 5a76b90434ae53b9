"""Pages for people: what a detector finds and what it gets wrong, and how a training run went, as one HTML file."""

from metr.report.evaluation_page import read_report, write_evaluation_page
from metr.report.run_page import write_run_page

__all__ = ["read_report", "write_evaluation_page", "write_run_page"]
