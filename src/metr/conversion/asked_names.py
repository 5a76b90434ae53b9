"""Which names a text asks for: names between commas, or those of datasets."""

from pathlib import Path

from metr.conversion.class_heads import told_apart
from metr.data.joint import open_joint
from metr.errors import ConfigError, DataError, ModelError
from metr.text.vocabulary import Vocabulary

_FILES = frozenset({".yaml", ".yml", ".json", ".csv", ".txt", ".xml", ".parquet", ".zip", ".tar", ".tgz", ".gz"})
"""How files of datasets end, which are no names."""


def read_names(names: str) -> Vocabulary:
    """The names of a dataset, label by label, or of several between commas; else names between commas.

    Raises:
        ConfigError: a name is empty or given twice.
        DataError: a dataset cannot be read, or names and datasets are mixed.
    """
    if not names.strip():
        raise ConfigError("expected names or a dataset, found nothing", where="names", hint='"penguin, shark"')
    if parts := datasets_of(names):
        vocabulary = open_joint(parts).vocabulary
        return Vocabulary.of(vocabulary.names, vocabulary.prompts)
    names = names.strip()
    if "," not in names and ("/" in names or Path(names).suffix.lower() in _FILES):
        hint = f'names go between commas: "penguin, shark"; if it is a name: "{names},"'
        raise ModelError("no such dataset", where=names, hint=hint)
    return Vocabulary.of(told_apart(names.removesuffix(",").split(",")))


def datasets_of(names: str) -> list[str]:
    """The datasets that a text names, if it names datasets.

    Raises:
        DataError: names and datasets are mixed.
    """
    parts = [names] if _is_there(names) else [part.strip() for part in names.split(",")]
    there = [part for part in parts if _is_there(part) and (len(parts) == 1 or "/" in part)]
    if there and (strange := [part for part in parts if part not in there]):
        what = f"{there[0]} is a folder or file, and {strange[0]} is none"
        raise DataError(what, where=names, hint="name datasets alone, or names alone")
    return there


def _is_there(dataset: str) -> bool:
    try:
        return Path(dataset.partition("=")[2] or dataset).expanduser().exists()
    except (OSError, ValueError):  # names may be longer than a path can be
        return False
