"""Names of files that are not UTF-8: what can be stored of them, and how they are shown."""

import os

# No name of a file has it.
_MARK = "\0"


def encodable(text: str) -> bool:
    """Whether a text can be stored as it is."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown_name(text: str) -> str:
    r"""A text with the bytes that are not UTF-8 as numbers, `\xe9`."""
    if text.isascii() or encodable(text):
        return text
    try:
        return os.fsencode(text).decode(errors="backslashreplace")
    except UnicodeEncodeError:  # half a character that no file's name has
        return text.encode(errors="backslashreplace").decode()


def packed_name(text: str) -> str:
    """A path as it can be stored; `unpacked_name` gives it back."""
    if text.isascii() or encodable(text):
        return text
    return _MARK + text.encode(errors="surrogatepass").hex()


def unpacked_name(text: str) -> str:
    """The path that `packed_name` made storable."""
    return bytes.fromhex(text[1:]).decode(errors="surrogatepass") if text.startswith(_MARK) else text
