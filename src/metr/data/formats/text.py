"""Text of files whose encoding nobody knows: UTF-8, with or without a mark, else what Windows wrote in the West."""

from metr.data.formats.base import Reading

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def encoding_of(data: bytes) -> str:
    """UTF-8 where the bytes are that, else Windows-1252, else Latin-1, which all bytes are."""
    for encoding in ("utf-8-sig", "cp1252"):
        try:
            data.decode(encoding)
        except UnicodeDecodeError:
            continue
        return encoding
    return "latin-1"


def decoded(data: bytes) -> str:
    """The text of some bytes. No two differing bytes become the same character, so that names stay apart."""
    return data.decode(encoding_of(data))


def read_text(where: str, reading: Reading) -> str:
    """The text of a file, relative to the dataset's folder; noted where it is not UTF-8.

    Raises:
        DataError: it cannot be read.
    """
    data = reading.files.read(where)
    encoding = encoding_of(data)
    note_encoding(encoding, where, reading)
    return data.decode(encoding)


def note_encoding(encoding: str, where: str, reading: Reading) -> None:
    """Notes a file that is not UTF-8."""
    if encoding != "utf-8-sig":
        reading.notes.once("not UTF-8", where, f"read as {encoding}: save it as UTF-8 if names look wrong")
