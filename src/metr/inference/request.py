"""What a command asks a detector for, checked before torch is imported and the detector is loaded."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

import yaml

from metr.bounded_yaml import load_yaml_file, yaml_fault
from metr.errors import ConfigError, DataError, did_you_mean
from metr.inference.config import Form, Labels, TilesConfig
from metr.writable import check_folder_to_write

__all__ = ["check_forms", "check_labels", "names_to_find", "parsed_tiles"]

_YAML = {".yaml", ".yml"}
_PHRASES = re.compile(r":\s*\[")


def names_to_find(categories: str | None, file: Path | None) -> list[str] | dict[str, list[str]] | None:
    """The names that a command asks for; None if it names none.

    Args:
        categories: Names between commas.
        file: Names, one a line, lines that begin with `#` left out; or YAML: a list of names, or a mapping from each
            name to the phrase or phrases that describe it.

    Raises:
        ConfigError: both are given, or the file cannot be read or names nothing.
    """
    if file is None:
        return None if categories is None else [name.strip() for name in categories.split(",")]
    if categories is not None:
        raise ConfigError("expected --categories or --categories-file, found both", where="--categories-file")
    hint = "write one name a line; or a .yaml file: name: [phrase, another phrase]"
    if not file.is_file():
        raise ConfigError("no such file of names", where=file, hint="check the path")
    try:
        if file.suffix in _YAML:
            values = load_yaml_file(file, as_written=True)
        else:
            values = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"the file of names cannot be read: {yaml_fault(error)}", where=file, hint=hint) from None
    if isinstance(values, dict) and values:
        phrases = {name: [some] if isinstance(some, str) else some for name, some in values.items()}
        if all(isinstance(name, str) and _are_texts(some) for name, some in phrases.items()):
            return phrases
    elif isinstance(values, list):
        names = [name for name in values if name and not str(name).startswith("#")]
        if file.suffix not in _YAML and (yaml_line := next((name for name in names if _PHRASES.search(name)), None)):
            raise ConfigError(
                f"a line that looks like YAML: {yaml_line}", where=file, hint="end the file's name in .yaml"
            )
        if _are_texts(names):
            return names
    raise ConfigError("expected names", where=file, hint=hint)


def _are_texts(values: object) -> bool:
    if not isinstance(values, list) or not values:
        return False
    return all(isinstance(one, str) and one.strip() for one in values)


def check_labels(labels: str) -> Labels:
    """What is written at drawn boxes.

    Raises:
        ConfigError: it is not one of names, scores and none.
    """
    known = get_args(Labels)
    if labels not in known:
        raise ConfigError(f"no kind of labels {labels!r}", where="--labels", hint=did_you_mean(labels, known))
    return cast("Labels", labels)


def check_forms(forms: Sequence[str], out: Path) -> tuple[Form, ...]:
    """The forms that a command asks for, each once.

    Raises:
        ConfigError: there is no such form.
        DataError: a dataset would be written into a folder that is not empty.
        CheckpointError: crops cannot be written.
    """
    for form in forms:
        if form not in get_args(Form):
            raise ConfigError(f"no form {form!r}", where="--save", hint=did_you_mean(form, get_args(Form)))
        folder = out / form
        if form in {"coco", "yolo"} and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DataError("there is something of an earlier call", where=folder, hint="remove it, or take another -o")
        if form == "crops":
            check_folder_to_write(folder)
    return cast("tuple[Form, ...]", tuple(dict.fromkeys(forms)))


def parsed_tiles(text: str) -> TilesConfig:
    """The tiles that a command asks for: `640`, or `640x480` (width and height in pixels).

    Raises:
        ConfigError: it is neither.
    """
    sides = re.fullmatch(r"(\d{1,6})(?:[xX](\d{1,6}))?", text.strip())
    if sides is None:
        raise ConfigError(f"expected pixels, found {text!r}", where="--tiles", hint="--tiles 640, or 640x480")
    width = int(sides[1])
    return TilesConfig.checked({"width": width, "height": int(sides[2] or width)}, where="--tiles")
