"""Writes tables of configuration keys, from the classes that check them.

A page has the tables of a class and of the classes inside it between `<!-- configuration: package.module.Class -->` and
`<!-- end of configuration -->`. They stand in the file itself, for people who read it in the repository; `python
docs/hooks/configuration.py` writes them anew, and a test says when that is due. The site has those of its own code.
Types, limits and defaults are pydantic's; descriptions are the strings below the fields or the comments above them.
"""

import ast
import inspect
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

if TYPE_CHECKING:  # the tables are written and tested without mkdocs
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

_PAGES = Path(__file__).resolve().parents[1]
_END = "<!-- end of configuration -->"
_MARKER = re.compile(rf"^<!-- configuration: (\S+) -->\n(?:.*?^{_END}\n)?", re.MULTILINE | re.DOTALL)
_LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_HEAD = "| key | type | default | meaning |\n|---|---|---|---|"

Schema = Mapping[str, Any]


def on_page_markdown(markdown: str, page: "Page", config: "MkDocsConfig", files: "Files") -> str:
    """Writes the tables of a page of the site."""
    del page, config, files
    return with_tables(markdown)


def with_tables(markdown: str) -> str:
    """A page with its tables as they are now."""

    def written(marker: re.Match[str]) -> str:
        return f"<!-- configuration: {marker[1]} -->\n\n{tables(_imported(marker[1]))}\n\n{_END}\n"

    return _MARKER.sub(written, markdown)


def main() -> None:
    """Writes the tables of all pages into their files."""
    for page in sorted(_PAGES.rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        if (fresh := with_tables(text)) != text:
            page.write_text(fresh, encoding="utf-8")


def tables(cls: type[BaseModel]) -> str:
    """A section for the class and for each configuration class inside it, with one row a key."""
    return "\n\n".join(_section(prefix, part) for prefix, part in sections(cls))


def sections(cls: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """The class and those inside it, each with the key under which it stands."""
    yield prefix, cls
    for name, part in _inside(cls).items():
        yield from sections(part, f"{prefix}.{name}".lstrip("."))


def descriptions(cls: type[BaseModel]) -> dict[str, str]:
    """What stands in the class's source about its fields."""
    source = dedent(inspect.getsource(cls))
    lines, found = source.splitlines(), {}
    (tree,) = ast.parse(source).body
    statements = tree.body if isinstance(tree, ast.ClassDef) else []
    for place, statement in enumerate(statements):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            after = statements[place + 1] if place + 1 < len(statements) else None
            found[statement.target.id] = _string(after) or _comment(lines, statement.lineno - 1)
    return found


def _section(prefix: str, cls: type[BaseModel]) -> str:
    schema = cls.model_json_schema()
    parts, said = _inside(cls), descriptions(cls)
    path = f"{prefix}." if prefix else ""
    rows = [
        f"| `{path}{name}` | {_cell(_type(item, schema))} | {_default(cls.model_fields[name])} | {_cell(said[name])} |"
        for name, item in schema["properties"].items()
        if name not in parts
    ]
    title = f"### `{prefix}`\n\n" if prefix else ""
    table = "\n".join([_HEAD, *rows]) if rows else ""
    return f"{title}{inspect.getdoc(cls) or ''}\n\n{table}".rstrip()


def _inside(cls: type[BaseModel]) -> dict[str, type[BaseModel]]:
    annotations = {name: field.annotation for name, field in cls.model_fields.items()}
    return {name: kind for name, kind in annotations.items() if inspect.isclass(kind) and issubclass(kind, BaseModel)}


def _type(item: Schema, whole: Schema) -> str:
    """A schema in words: `number ≥ 0`, `"auto" or "cpu"`, `list of integer`."""
    if "$ref" in item:
        return _type(whole["$defs"][item["$ref"].rsplit("/", 1)[1]], whole)
    if "anyOf" in item:
        return " or ".join(dict.fromkeys(_type(option, whole) for option in item["anyOf"]))
    if "enum" in item:
        return ", ".join(f"`{value}`" for value in item["enum"])
    if "const" in item:
        return f"`{item['const']}`"
    kind = item.get("type", "anything")
    if kind == "array":
        return _array(item, whole)
    if kind == "object":
        of = item.get("additionalProperties")
        inner = _type(of, whole) if isinstance(of, Mapping) else "anything"
        return f"mapping of ({inner})" if " or " in inner else f"mapping of {inner}"
    limits = " and ".join(f"{sign} {item[key]:g}" for key, sign in _LIMITS.items() if key in item)
    return f"{ {'null': '`null`', 'string': 'text'}.get(kind, kind) } {limits}".strip()


def _array(item: Schema, whole: Schema) -> str:
    if "prefixItems" in item:
        kinds = [_type(part, whole) for part in item["prefixItems"]]
        return f"{len(kinds)} × {kinds[0]}" if len(set(kinds)) == 1 else f"[{', '.join(kinds)}]"
    return f"list of {_type(item.get('items', {}), whole)}"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "(required)"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, tuple) and any(isinstance(part, str) for part in value):
        return "<br>".join(f"`{part}`" for part in value)
    if isinstance(value, tuple):
        value = list(value)
    if value is None or isinstance(value, bool):
        value = "null" if value is None else str(value).lower()
    return f"`{value}`"


def _string(statement: ast.stmt | None) -> str:
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return inspect.cleandoc(str(statement.value.value))
    return ""


def _comment(lines: list[str], place: int) -> str:
    """The lines of comment right above a line."""
    above: list[str] = []
    while place > 0 and lines[place - 1].strip().startswith("#"):
        place -= 1
        above.insert(0, lines[place].strip().removeprefix("#").strip())
    return " ".join(above)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _imported(path: str) -> type[BaseModel]:
    module, _, name = path.rpartition(".")
    found = getattr(import_module(module), name)
    if not (inspect.isclass(found) and issubclass(found, BaseModel)):
        raise TypeError(f"expected a configuration class, found {path}")
    return found


if __name__ == "__main__":
    main()
