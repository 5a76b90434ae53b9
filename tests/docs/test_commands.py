"""The commands and snippets of the documentation that are marked as runnable run, in a folder with small datasets.

`<!-- runnable -->` stands above a fence of `sh` or `python`; `<!-- file: NAME -->` above a fence whose text is written
to that file first. The fences of a page run in their order, in one folder and in this process. Training is shortened.
"""

import re
import runpy
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from metr.cli.main import run as run_command_line
from metr.demo import write_demo_datasets, write_unseen

from tiny import write_recipe

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^<!-- (runnable|file: (?P<file>\S+)) -->\n+```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
# What a command of the pages is told besides, so that it ends soon. The last of two equal options counts.
SHORTER = {
    "train": "--config small.yaml --steps 2",
    "finetune": "--steps 2 --set loader.batch_size=2 --set loader.workers=0 --set train.loop.curves=false",
    "finetune_detector.py": "--steps 1",
}
# The same for snippets: what stands there, and what is run instead.
SHORTER_STEPS = ("max_steps=500", "max_steps=1")


@dataclass(frozen=True, kw_only=True)
class Fence:
    """A fence that is to be run, or written to `file`."""

    line: int
    language: str
    text: str
    file: str | None

    @property
    def commands(self) -> Iterator[list[str]]:
        """The commands of a shell fence, word by word, without comments."""
        for line in self.text.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def fences(page: Path) -> list[Fence]:
    """The marked fences of a page."""
    text = page.read_text(encoding="utf-8")
    return [
        Fence(
            line=text.count("\n", 0, found.start("text")),
            language=found["language"],
            text=found["text"],
            file=found["file"],
        )
        for found in FENCE.finditer(text)
    ]


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a command in this process."""
    program, arguments = (words[0], words[1:]) if words[0] == "metr" else (Path(words[1]).name, words[2:])
    shorter = SHORTER.get(arguments[0] if program == "metr" else program, "")
    if arguments[:1] == ["train"] and "--from" in arguments:  # its network is that of the detector it begins with
        shorter = SHORTER["finetune"]
    shorter = "" if "--resume" in arguments else shorter  # it goes on as it was begun
    monkeypatch.setattr("sys.argv", [program, *arguments, *shlex.split(shorter)])
    try:
        run_command_line() if program == "metr" else runpy.run_path(words[1], run_name="__main__")
    except SystemExit as end:
        if end.code:
            pytest.fail(f"{shlex.join(words)}: {end.code}")


def place(fence: Fence, page: Path) -> str:
    """Where a fence stands."""
    return f"{page.relative_to(ROOT)}, line {fence.line}"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small datasets of different formats, and images without annotations."""
    folder = tmp_path_factory.mktemp("drawn")
    write_demo_datasets(folder / "data", seed=0, train=4, val=2)
    write_unseen(folder / "unseen", seed=0, count=3)
    return folder


@pytest.fixture
def here(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: the datasets where the demo leaves them, the project's detector and examples."""
    shutil.copytree(drawn, tmp_path / "demo")
    for name in ("checkpoints", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_recipe(tmp_path / "small.yaml", "bundled:minilm")
    for name, value in {"HF_HUB_OFFLINE": "1", "COLUMNS": "120"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_marker_stands_above_a_fence_that_can_be_run(page: Path) -> None:
    marked = fences(page)
    text = page.read_text(encoding="utf-8")
    assert len(marked) == len(re.findall(r"<!-- (?:runnable|file: )", text))
    for fence in marked:
        assert fence.file or fence.language in {"sh", "python"}, place(fence, page)
        if fence.language == "sh":
            for words in fence.commands:
                assert words[0] in {"metr", "python"}, place(fence, page)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # transformers' Trainer
@pytest.mark.parametrize(
    "page", [page for page in PAGES if fences(page)], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_the_commands_of_a_page_run(page: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for fence in fences(page):
        if fence.file is not None:
            (here / fence.file).write_text(fence.text, encoding="utf-8")
        elif fence.language == "python":
            exec(compile(fence.text.replace(*SHORTER_STEPS), place(fence, page), "exec"), {"__name__": "__main__"})
        else:
            for words in fence.commands:
                run(words, monkeypatch)
