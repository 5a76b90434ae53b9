"""What fits a console: tables leave whole columns out where there is no room, lines are wrapped between words."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.text import Text

_UNBOUNDED = 100_000
_FURTHER = "  "  # before each line of a wrapped one but the first


@dataclass(frozen=True)
class Fitting:
    """Renders the first of several choices that is no wider than the console, or else the last.

    The choices may be made as they are needed; begin with the one that tells most.
    """

    choices: Iterable[RenderableType]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Renders the choice."""
        unbounded = options.update(max_width=_UNBOUNDED)
        found: RenderableType = ""
        for found in self.choices:
            if Measurement.get(console, unbounded, found).maximum <= options.max_width:
                break
        yield found


@dataclass(frozen=True)
class Hanging:
    """A line that a terminal gets wrapped between words, its further lines further to the right.

    No word is broken, and so no path; print it with `crop=False`. Where there is no terminal the line stays whole.
    """

    text: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Renders the lines."""
        lines = self._lines(options.max_width) if console.is_terminal else [self.text]
        yield Text("\n".join(lines), no_wrap=True, overflow="ignore")

    def _lines(self, width: int) -> list[str]:
        words = self.text.split()
        indent = " " * (len(self.text) - len(self.text.lstrip()))
        lines = [indent + (words[0] if words else "")]
        for word in words[1:]:
            longer = f"{lines[-1]} {word}"
            if cell_len(longer) <= width:
                lines[-1] = longer
            else:
                lines.append(f"{indent}{_FURTHER}{word}")
        return lines


def number_text(value: float, digits: int = 3) -> str:
    """A number with so many decimals, or with an exponent where it would be long or all zeros."""
    if value and not 10.0**-digits <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:.{digits}f}"
