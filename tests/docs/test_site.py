"""The documentation builds strictly and tells every key; what the project says of itself agrees."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from metr.training.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
WORDS = 900


def hook(name: str) -> ModuleType:
    """A hook of the documentation, as a module."""
    spec = spec_from_file_location(f"docs_{name}", ROOT / "docs" / "hooks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def needs_mkdocs() -> None:
    if find_spec("mkdocstrings") is None:
        pytest.skip("needs mkdocs-material and mkdocstrings (pip install 'metr[docs]')")


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= WORDS


def test_ruff_is_the_same_in_pre_commit_and_in_the_environment() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert f"\nruff=={repository['rev'].removeprefix('v')}\n" in (ROOT / "constraints.txt").read_text()


def test_the_citation_names_software_and_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["title"].startswith("METR")
    assert {"authors", "title", "type", "year"} <= citation["preferred-citation"].keys()
    assert "2304.03580" in citation["preferred-citation"]["url"]


def test_every_key_of_a_recipe_is_in_the_tables() -> None:
    configuration = hook("configuration")
    told = configuration.tables(RunConfig)
    for prefix, part in configuration.sections(RunConfig):
        inside = dict(configuration.sections(part))
        for key in part.model_fields:
            name = f"{prefix}.{key}".lstrip(".")
            assert f"`{name}`" in told or key in inside, name
    assert re.search(r"\| `augmentation\.flip` \| number ≥ 0 and ≤ 1 \| `0\.5` \| \w+", told), (
        "a comment is its meaning"
    )
    assert re.search(r"\| `train\.loop\.seed` \| integer ≥ 0 \| `0` \| \w+", told), "a string below it is its meaning"
    assert "| `train.loop.device` | `auto`, `cpu` | `auto` |" in told
    assert re.search(r"\| `loader\.workers` \| integer ≥ 0 and ≤ 1,?024 or `null` \| `null` \|", told)


def test_the_tables_in_the_pages_are_those_of_the_code() -> None:
    """People read the pages in the repository, where nothing writes the tables for them."""
    configuration, asked = hook("configuration"), 0
    for page in sorted((ROOT / "docs").rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        asked += text.count("<!-- configuration: ")
        assert configuration.with_tables(text) == text, f"{page.name}: run python docs/hooks/configuration.py"
    assert asked >= 5
    assert "| `train.loop.seed` | integer" in (ROOT / "docs/configuration.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    needs_mkdocs()
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "results" / "multifield" / "index.html").read_text(encoding="utf-8")
    assert "fonts.googleapis.com" not in page
    images = {path.name for path in (ROOT / "benchmarks" / "results").iterdir() if path.suffix in {".png", ".jpg"}}
    shown = {image for image in images for html in (tmp_path / "site").rglob("*.html") if image in html.read_text()}
    assert shown == images
