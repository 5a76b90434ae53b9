"""Output that nobody reads any more ends no training, and leaves nothing that Python trips over at its end."""

import os
from collections.abc import Iterator
from typing import TextIO

import pytest
from rich.console import Console

from metr.cli.output import SafeConsole
from metr.lost_output import UNREAD, lasting, let_go

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs pipes as POSIX has them")


@pytest.fixture
def unread() -> Iterator[TextIO]:
    """A pipe whose reader is gone."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        yield stream
        let_go(stream)  # of a test that fails


def test_a_lasting_console_goes_on_and_says_it_once(unread: TextIO) -> None:
    console, told = Console(file=unread), list[str]()
    with lasting(console, lambda: told.append("lost")):
        for _ in range(3):
            console.print("a step")
    assert told == ["lost"]
    assert console.file is unread
    unread.write("what others write goes nowhere")
    unread.flush()


def test_a_lasting_console_shows_what_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    with lasting(console):
        console.print("a step")
    assert capsys.readouterr().out == "a step\n"


def test_other_consoles_end_the_command_in_silence(unread: TextIO) -> None:
    with pytest.raises(SystemExit) as ended:
        SafeConsole(file=unread).print("a table")
    assert ended.value.code == UNREAD
    unread.flush()


def test_a_message_that_nobody_reads_ends_nothing(unread: TextIO) -> None:
    SafeConsole(file=unread, stderr=True).print("error: a mistake")
    unread.flush()
