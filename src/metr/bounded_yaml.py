"""YAML from anywhere: the one place where the package reads it. A small file cannot become gigabytes or take hours."""

import codecs
import re
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from metr.errors import ConfigError

__all__ = ["load_yaml", "load_yaml_file", "parse_yaml", "with_line", "yaml_fault", "yaml_text"]

# The most characters of a text: some five seconds of parsing for each million.
_LONGEST = 4_000_000
# The deepest nesting of lists and mappings.
_DEEPEST = 64
# The most values that aliases (`*name`) may stand for, all together. Ten aliases of ten aliases of ... would else
# make billions of a few lines.
_ALIASED = 10_000
# The most characters of an unquoted scalar that may be a number, a date or a truth value; a longer one is text.
_LONGEST_NUMBER = 128
# How the message of a configuration error begins that is about one key.
_FAULTY_KEY = re.compile(r"(?:unknown key )?'([^']+)'")


def load_yaml(text: str, *, as_written: bool = False) -> Any:
    """The plain values that a YAML text holds; None of an empty one.

    Args:
        text: The text.
        as_written: Whether every scalar is the text that is written: else `no` is False, `007` is 7, `12:30` is 750.

    Raises:
        yaml.YAMLError: the text is no YAML, or is too long, too deeply nested or has too many aliases. No other error.
    """
    loader = _loader(text, as_written=as_written)
    try:
        return loader.get_single_data()
    except (ValueError, RecursionError, OverflowError, TypeError, KeyError, AttributeError) as error:
        # an impossible date, an odd key of a mapping or `!!` tag on something else
        raise yaml.YAMLError(f"a value cannot be read: {error}") from None
    finally:
        loader.dispose()


def load_yaml_file(path: Path, *, as_written: bool = False) -> Any:
    """The plain values that a YAML file holds, in UTF-8 or with the mark of UTF-16; see `load_yaml`.

    Raises:
        yaml.YAMLError: as `load_yaml`, or it is no regular file, or neither UTF-8 nor UTF-16.
        OSError: it cannot be read.
    """
    if not path.is_file():  # reading a pipe or a device might never end
        raise yaml.YAMLError("not a regular file")
    if (size := path.stat().st_size) > 4 * _LONGEST:  # a character takes up to four bytes
        raise yaml.YAMLError(f"{size:,} bytes; METR reads at most {_LONGEST:,} characters")
    try:
        return load_yaml(yaml_text(path), as_written=as_written)
    except UnicodeError as error:
        raise yaml.YAMLError(f"not UTF-8: {error}") from None


def yaml_text(path: Path) -> str:
    """The text of a YAML file: UTF-16 where the file begins with its mark, else UTF-8.

    Raises:
        UnicodeError: it is neither.
        OSError: it cannot be read.
    """
    data = path.read_bytes()
    return data.decode("utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")


def parse_yaml(text: str) -> Node | None:
    """The nodes of a YAML text, with their lines; None of an empty one.

    Raises:
        yaml.YAMLError: as `load_yaml`.
    """
    loader = _loader(text)
    try:
        node: Node | None = loader.get_single_node()
        return node
    finally:
        loader.dispose()


def yaml_fault(error: Exception) -> str:
    """What is wrong with a YAML text, with line and column, for a message that names the file."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        told = ", ".join(part for part in (error.context, error.problem) if part)
        return told if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: {told}"
    return " ".join(str(error).replace('in "<unicode string>", ', "").split())


def _loader(text: str, *, as_written: bool = False) -> "_BoundedLoader":
    if len(text) > _LONGEST:
        raise yaml.YAMLError(f"{len(text):,} characters; METR reads at most {_LONGEST:,}")
    loader = _BoundedLoader(text)
    loader.as_written = as_written
    return loader


class _BoundedLoader(yaml.SafeLoader):
    """PyYAML's safe loader with bounds on nesting, on what aliases stand for, and on the length of numbers."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.as_written = False
        self._depth = 0
        self._aliased = 0
        self._sizes: dict[int, int] = {}  # values below a node that is finished, by its id

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """A node, with the values below it counted; an alias costs as many as its anchor holds."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            anchored = self.anchors.get(event.anchor)
            if anchored is not None:
                self._count_alias(anchored, event)
        self._depth += 1
        if self._depth > _DEEPEST:
            self._refuse(f"nested too deeply: more than {_DEEPEST} levels", event)
        node: Node | None = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None and id(node) not in self._sizes:
            self._sizes[id(node)] = 1 + sum(self._sizes[id(child)] for child in _children(node))
        return node

    def _count_alias(self, anchored: Node, event: Any) -> None:
        size = self._sizes.get(id(anchored))
        if size is None:
            self._refuse(f"*{event.anchor} stands within what it stands for", event)
            return
        self._aliased += size
        if self._aliased > _ALIASED:
            self._refuse(f"aliases (*{event.anchor}) stand for more than {_ALIASED:,} values; write them out", event)

    def resolve(self, kind: type[Node], value: Any, implicit: Any) -> Any:
        """The tag of a value: a long unquoted scalar is text, whatever it looks like; so is any if it is as written."""
        if kind is ScalarNode and (len(value) > _LONGEST_NUMBER or (self.as_written and value != "<<")):
            return self.DEFAULT_SCALAR_TAG
        return super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]

    def construct_yaml_int(self, node: ScalarNode) -> int:
        """An integer, unless `!!int` stands before something too long to be one."""
        if len(node.value) > _LONGEST_NUMBER:
            raise yaml.YAMLError(f"a number of {len(node.value):,} characters{node.start_mark}")
        value: int = super().construct_yaml_int(node)
        return value

    @staticmethod
    def _refuse(what: str, event: Any) -> None:
        mark = event.start_mark
        raise yaml.YAMLError(f"{what} (line {mark.line + 1}, column {mark.column + 1})")


def _children(node: Node) -> list[Node]:
    if isinstance(node, MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, SequenceNode) else []


_BoundedLoader.add_constructor("tag:yaml.org,2002:int", _BoundedLoader.construct_yaml_int)


def with_line(error: ConfigError, file: Path, node: Node | None, called: str = "") -> ConfigError:
    """An error about a key of a part of a file (None of an empty one), with the line of that key, or of the part."""
    if node is None:
        return error
    faulty = _FAULTY_KEY.match(error.what)
    line = node.start_mark.line
    for part in faulty[1].split(".") if faulty else ():
        pairs: list[tuple[Node, Node]] = []
        if isinstance(node, MappingNode):
            pairs = [pair for pair in node.value if pair[0].value == part]
        elif isinstance(node, SequenceNode):
            pairs = [(value, value) for place, value in enumerate(node.value) if str(place) == part]
        if not pairs:
            break
        key, node = pairs[-1]
        line = key.start_mark.line
    return ConfigError(f"{called}{error.what}", where=f"{file}, line {line + 1}", hint=error.hint)
