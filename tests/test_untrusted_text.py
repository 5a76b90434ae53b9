"""Names and paths from elsewhere reach terminals, logs and Markdown as text, and never as anything else."""

import json
import logging
import os
import shutil
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.table import Table

from metr.cli.output import LogHandler, SafeConsole
from metr.config import read_yaml
from metr.errors import CheckpointError, MetrError, markdown, shown
from metr.inference.result_files import RESULTS
from metr.serialization import read_json, write_json
from metr.text.similar_names import MOST_PAIRS, EmbeddingSimilarity, spelling_matches

from tiny import CommandLine, TinyRun, metr, tiny_run

__all__ = ["metr", "tiny_run"]

HOSTILE = "\x1b]0;owned\x07\x1b[2Jcat\r\x9b31m\u202egpj.exe\udce9\ud800\x00"


def test_text_is_written_out() -> None:
    assert shown(HOSTILE) == r"\x1b]0;owned\x07\x1b[2Jcat\x0d\x9b31m\u202egpj.exe\xe9\ud800\x00"
    plain = "naïve café 猫 سمك один\ttab\nline 🐟"
    assert shown(plain) == plain


def test_markdown_is_written_out() -> None:
    assert markdown("<script>alert(1)</script>") == "&lt;script>alert(1)&lt;/script>"
    assert markdown("a | b\n# c [x](http://y) `d` *e* _f_") == r"a \| b # c \[x\](http://y) \`d\` \*e\* \_f\_"
    assert "\x1b" not in markdown(HOSTILE)


def test_consoles_and_logs_write_it_out() -> None:
    page = StringIO()
    console = SafeConsole(file=page, width=200, force_terminal=True, color_system="standard")
    table = Table(title=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE, style="red")
    console.print(table)
    console.print(HOSTILE, style="bold", markup=False)
    text = page.getvalue()
    assert "\x1b[2J" not in text
    assert "\x1b]0" not in text
    assert "\u202e" not in text
    assert "\x1b[" in text, "the console's own styles stay"
    text.encode()
    record = logging.LogRecord("metr", logging.WARNING, "", 0, "%s is odd", (HOSTILE,), None)
    assert "\x1b" not in LogHandler().format(record)


def test_names_that_are_not_utf_8_do_not_lose_results(tmp_path: Path, tiny_run: TinyRun, metr: CommandLine) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    image = next(path for path in tiny_run.unseen[0].parent.iterdir() if path.suffix in {".jpg", ".png"})
    for name in (b"a.jpg", b"caf\xe9.jpg", b"z.jpg", b"\x1b[2J.jpg"):
        shutil.copy(image, os.fsdecode(os.fsencode(folder) + b"/" + name))
    ended = metr("detect", tiny_run.best, folder, "-o", tmp_path / "found")
    assert ended.code == 0, ended.err
    assert "\x1b[2J" not in ended.out
    listed = json.loads((tmp_path / "found" / "images.json").read_text())["images"]
    assert len(listed) == 4
    assert any(b"caf\xe9.jpg" in os.fsencode(one["file_name"]) for one in listed)
    assert json.loads((tmp_path / "found" / RESULTS).read_text()) is not None


def test_what_was_found_is_kept_when_something_fails(
    tmp_path: Path, tiny_run: TinyRun, metr: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from metr.inference import detect_files

    draw, drawn = detect_files._draw, []

    def failing(*arguments: object) -> None:
        if len(drawn) == 2:
            raise MetrError("no room")
        drawn.append(arguments)
        draw(*arguments)

    monkeypatch.setattr(detect_files, "_draw", failing)
    image = next(path for path in tiny_run.unseen[0].parent.iterdir() if path.suffix in {".jpg", ".png"})
    copies = [shutil.copy(image, tmp_path / f"{number}.jpg") for number in range(5)]
    assert metr("detect", tiny_run.best, *copies, "-o", tmp_path / "found").code == 1
    assert len(json.loads((tmp_path / "found" / "images.json").read_text())["images"]) == 3


@pytest.mark.parametrize(
    "argument",
    [os.fsdecode(b"caf\xe9"), "\x1b[2J", "x" * 10_000, "a\udc80=b"],
    ids=["latin-1", "escape", "long", "surrogate"],  # workers of pytest-xdist cannot send the values as names
)
@pytest.mark.parametrize("verb", ["inspect", "train", "detect", "evaluate"])
def test_odd_arguments_end_in_a_message(argument: str, verb: str, metr: CommandLine) -> None:
    more = {"detect": ["x.jpg"], "evaluate": ["data"], "train": ["-o", "/nonexistent/run"]}.get(verb, [])
    ended = metr(verb, argument, *more)
    assert ended.code in {1, 2}
    assert "\x1b[2J" not in ended.err
    ended.err.encode()


def test_deep_nesting_ends_in_a_message(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="not readable as JSON"):
        read_json(tmp_path / "config.json")
    (tmp_path / "a.yaml").write_text("a: " + "{a: " * 100_000)
    with pytest.raises(MetrError, match="nested too deeply"):
        read_yaml(tmp_path / "a.yaml")
    values = {"name": os.fsdecode(b"caf\xe9"), "plain": "é"}
    write_json(tmp_path / "b.json", values)
    assert read_json(tmp_path / "b.json") == values


def test_many_alike_names_take_bounded_memory() -> None:
    names = tuple(f"name {number}" for number in range(8_000))
    vectors = torch.nn.functional.normalize(torch.ones(8_000, 8) + 0.01 * torch.randn(8_000, 8), dim=1)
    pairs = EmbeddingSimilarity(source="made", names=names, vectors=vectors).pairs(0.5)
    assert len(pairs) == MOST_PAIRS
    assert min(strength for *_, strength in pairs) > 0.99
    few = EmbeddingSimilarity(source="made", names=names[:600], vectors=torch.eye(600)[torch.arange(600) // 2])
    assert [(one, two) for one, two, _ in few.pairs(0.5)] == list(zip(names[0:600:2], names[1:600:2], strict=True))


def test_long_and_many_spellings_end() -> None:
    assert spelling_matches(["x" * 1_000_000, "x" * 999_999 + "y"]) == ()
    same = [f"{'a' * number}{' ' * (number % 7)}B{'c' * 5}" for number in range(300)]
    cases = [
        "".join(c.upper() if number >> bit & 1 else c for bit, c in enumerate("abcdefghijklmn"))
        for number in range(9000)
    ]
    assert len(spelling_matches([*same, *dict.fromkeys(cases)])) <= 4 * MOST_PAIRS
