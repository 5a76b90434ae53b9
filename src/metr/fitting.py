"""Tables that fit a console: whole columns are left out where there is no room; a number is never cut."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement

_UNBOUNDED = 100_000


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


def number_text(value: float, digits: int = 3) -> str:
    """A number with so many decimals, or with an exponent where it would be long or all zeros."""
    if value and not 10.0**-digits <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:.{digits}f}"
