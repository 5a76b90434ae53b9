"""Adds the Python reference: one page a package, which mkdocstrings fills from the docstrings."""

from collections.abc import Sequence

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

TITLE = "Python reference"
# The one list of what the reference shows: the page's title, the modules on it with everything inside them.
PAGES = {
    "metr": ("metr",),
    "metr.structures": ("metr.structures",),
    "metr.boxes": ("metr.boxes",),
    "metr.config": ("metr.config", "metr.errors"),
    "metr.text": ("metr.text",),
    "metr.layers": ("metr.layers",),
    "metr.models": ("metr.models",),
    "metr.losses": ("metr.losses",),
    "metr.data": ("metr.data", "metr.data.joint"),
    "metr.inference": ("metr.inference", "metr.inference.detect_files"),
    "metr.evaluation": ("metr.evaluation", "metr.evaluation.runner"),
    "metr.report": ("metr.report.evaluation_page", "metr.report.run_page"),
    "metr.training": ("metr.training", "metr.training.train", "metr.training.finetune", "metr.training.finetune_data"),
    "metr.inspection": ("metr.inspection",),
    "metr.completion": (
        "metr.completion.complete",
        "metr.completion.request",
        "metr.completion.prelabels",
        "metr.completion.thresholds",
    ),
    "metr.conversion": ("metr.conversion", "metr.conversion.adoption", "metr.conversion.transfer"),
    "metr.export": ("metr.export.export", "metr.export.request", "metr.deploy"),
    "metr.serving": ("metr.serving", "metr.serving.app", "metr.serving.config"),
    "metr.sharing": ("metr.sharing.push", "metr.sharing.model_card"),
}
# Of the package itself only what it exports: its parts have pages of their own.
EXPORTS = "metr"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the pages into the navigation, after the section's own first page."""
    section = next(item[TITLE] for item in config.nav or [] if TITLE in item)
    section.extend({title: _path(title)} for title in PAGES)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Writes the pages."""
    for title, modules in PAGES.items():
        files.append(File.generated(config, _path(title), content=_content(title, modules)))
    return files


def _content(title: str, modules: Sequence[str]) -> str:
    shown = [module for module in modules if not any(module.startswith(f"{other}.") for other in modules)]
    if shown == [title]:
        options = "{heading_level: 1, show_submodules: false}" if title == EXPORTS else "{heading_level: 1}"
        return f"::: {title}\n    options: {options}\n"
    return f"# {title}\n\n" + "\n\n".join(f"::: {module}" for module in shown) + "\n"


def _path(title: str) -> str:
    return f"reference/{title}.md"
