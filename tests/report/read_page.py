"""What stands on a page, for tests: its tables, its elements, and what the script is given."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {"meta", "link", "img", "input", "br", "path", "rect", "circle"}


@dataclass
class Element:
    """An element with its attributes, its children and its text."""

    tag: str
    attributes: dict[str, str]
    children: list["Element"] = field(default_factory=list)
    own: list[str] = field(default_factory=list)

    def every(self, tag: str | None = None, **wanted: str) -> Iterator["Element"]:
        """The elements in it of a tag and with attributes (`data_value` for `data-value`)."""
        for child in self.children:
            fits = all(child.attributes.get(key.replace("_", "-").strip("-")) == value for key, value in wanted.items())
            if (tag is None or child.tag == tag) and fits:
                yield child
            yield from child.every(tag, **wanted)

    @property
    def text(self) -> str:
        """All text in it, in one line."""
        return " ".join(" ".join(self.own + [child.text for child in self.children]).split())

    @property
    def rows(self) -> list[list["Element"]]:
        """The cells of a table's body."""
        (body,) = self.every("tbody")
        return [[cell for cell in row.children if cell.tag in {"td", "th"}] for row in body.every("tr")]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].own.append(data)


def read_page(path: Path) -> Element:
    """A page; it must be well-formed."""
    reader = _Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == [reader.root]
    return reader.root


def one(page: Element, tag: str, **wanted: str) -> Element:
    """The only element of its kind."""
    (found,) = page.every(tag, **wanted)
    return found


def data_of(page: Element, name: str) -> Any:
    """What the script is given under a name."""
    return json.loads("".join(one(page, "script", id=name).own))
