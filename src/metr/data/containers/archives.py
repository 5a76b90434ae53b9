"""Archives of a dataset's folder: zip, and tar as it is or compressed by gzip, bzip2 or xz.

What an archive holds is not trusted. Paths and links that lead out of it, devices, passwords, and sizes far beyond that
of the archive end in an error. Regular files are written first and links made last, so that nothing is written through
a link.
"""

import contextlib
import logging
import os
import posixpath
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path
from typing import IO, Literal

from metr.data.containers.store import Budget, unpacked
from metr.data.formats.files import folders_in, glance, start_of, there
from metr.data.formats.locating import IMAGE_FOLDERS
from metr.data.records import canonical_split
from metr.errors import DataError

logger = logging.getLogger(__name__)

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")

# What a file takes at least, its name and its place on the disk.
_BYTES_OF_AN_ENTRY = 512
_PIECE = 1 << 20

_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")
_OTHERS = {b"Rar!": "RAR", b"7z\xbc\xaf\x27\x1c": "7-Zip", b"\x28\xb5\x2f\xfd": "Zstandard"}
# What systems put into archives beside the files.
_CRUFT = re.compile(r"(^|/)(__MACOSX|\._[^/]*|\.DS_Store|Thumbs\.db)(/|$)")
# Folders at the top of an archive that are a part of a dataset's layout.
_LAYOUT = frozenset({*map(str.lower, IMAGE_FOLDERS), "annotations", "labels", "imagesets", "obj_train_data"})
_DAMAGED = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, LZMAError, EOFError, OSError),
    *(NotImplementedError, RuntimeError, ValueError),
)


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One entry of an archive. `target` is what a link leads to, from the top of the archive or from its own folder."""

    name: str
    kind: Literal["file", "folder", "link", "hard link"]
    size: int = 0
    target: str = ""
    open: Callable[[], IO[bytes] | None] = lambda: None


def is_archive(path: Path) -> bool:
    """Whether a file is an archive that can be unpacked, by its first bytes.

    Raises:
        DataError: it is an archive of another kind.
    """
    if not there(path, Path.is_file):
        return False
    start = start_of(path, 512)
    if start.startswith(_ZIP):
        return True
    packed = start.startswith(_COMPRESSED) or start[257:262] == b"ustar" or path.suffix.lower() == ".tar"
    if packed and _opens_as_tar(path):
        return True
    other = next((name for magic, name in _OTHERS.items() if start.startswith(magic)), None)
    if other is not None:
        what = f"a {other} archive, which is not unpacked here"
        raise DataError(what, where=path, hint="unpack it and name the folder, or pack it as zip or tar.gz")
    return False


def archive_stem(path: Path) -> str | None:
    """The name of an archive without the suffixes of its kind; None where it has none of them."""
    lower = path.name.lower()
    suffix = max((suffix for suffix in SUFFIXES if lower.endswith(suffix)), key=len, default="")
    return path.name.removesuffix(path.name[-len(suffix) :]) or None if suffix else None


def archive_folders(path: Path) -> list[Path]:
    """The folders in which the dataset of an archive may lie, likeliest first; it is unpacked if need be.

    Raises:
        DataError: the archive is damaged or not safe, or the disk is too small.
    """
    top = unpacked(path, [path], lambda folder: _extract(path, folder), kind="archive")
    folders = [top]
    while (inner := _only_folder(folders[0])) is not None:
        folders.insert(0, inner)
    return folders


def _only_folder(folder: Path) -> Path | None:
    """The only entry of a folder, if it is a folder that is no part of a dataset's layout."""
    entries, below = glance(folder), folders_in(folder)
    if len(entries) != 1 or not below or below[0].is_symlink():
        return None
    name = below[0].name
    return None if canonical_split(name) or name.lower() in _LAYOUT else below[0]


def _opens_as_tar(path: Path) -> bool:
    try:
        with tarfile.open(path):
            return True
    except _DAMAGED:
        return False


def _extract(path: Path, folder: Path) -> None:
    size = path.stat().st_size
    budget = Budget(path, size, folder)
    zipped = start_of(path, 4).startswith(_ZIP)
    budget.expect(_declared_size(path) if zipped else size)
    links: dict[str, _Entry] = {}
    repeated: list[str] = []
    for entry in _zip_entries(path) if zipped else _tar_entries(path):
        budget.add_entry()
        budget.add_bytes(_BYTES_OF_AN_ENTRY)
        name = _safe_name(entry.name, path)
        if name is None:
            continue
        target = folder / name
        if entry.kind == "folder":
            target.mkdir(parents=True, exist_ok=True)
            continue
        if "link" in entry.kind:
            links[name] = entry
            continue
        if target.exists():
            repeated.append(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        _write(entry, target, path, budget)
    for name in repeated[:1]:
        logger.warning(
            "%s: files that come twice in it: %d, the first is %s; the later ones count", path, len(repeated), name
        )
    _make_links(links, folder, path)


def _write(entry: _Entry, target: Path, path: Path, budget: Budget) -> None:
    """Writes a regular file, and checks its length."""
    with _reading(path, entry.name):
        stream = entry.open()
    written = 0
    with contextlib.closing(stream) if stream else contextlib.nullcontext(), target.open("wb") as file:
        while stream is not None:
            with _reading(path, entry.name):
                piece = stream.read(_PIECE)
            if not piece:
                break
            budget.add_bytes(len(piece))
            written += len(piece)
            file.write(piece)
    if written != entry.size:
        raise _damaged(path, f"{entry.name} has {written} bytes in place of {entry.size}")


def _safe_name(name: str, path: Path) -> str | None:
    """The path of an entry below the top of its archive; None for entries that are passed over.

    Raises:
        DataError: it leads out of the archive.
    """
    parts = re.split(r"[/\\]", name)  # Windows takes both for separators, and a colon for a drive or a stream
    outside = name.startswith(("/", "\\")) or ".." in parts or "\0" in name or re.match(r"[A-Za-z]:[\\/]", name)
    if outside or (os.name == "nt" and ":" in name):
        what = f"holds {name[:200]!r}, a path that leads out of it"
        raise DataError(what, where=path, hint="pack the dataset's folder anew, or unpack it by hand if you trust it")
    plain = posixpath.normpath(name)
    return None if plain == "." or _CRUFT.search(plain) else plain


def _make_links(links: dict[str, _Entry], folder: Path, path: Path) -> None:
    """Makes the links of an archive: to a file as a second name of it, to a folder as a link within the copy.

    Links to links need those first, so that it is gone through them until no more can be made.
    """
    top, left = Path(os.path.realpath(folder)), dict(links)
    while left:
        made = [name for name, entry in left.items() if _make_link(name, entry, top, path)]
        if not made:
            break
        for name in made:
            del left[name]
    for name in [*left][:1]:
        detail = f"{name} -> {left[name].target}"
        logger.warning("%s: links in it that lead to nothing: %d, the first is %s; left out", path, len(left), detail)


def _make_link(name: str, entry: _Entry, top: Path, path: Path) -> bool:
    """Makes one link; False where there is nothing that it leads to."""
    base, leads_to = "" if entry.kind == "hard link" else posixpath.dirname(name), entry.target.replace("\\", "/")
    inner = posixpath.normpath(posixpath.join(base, leads_to))
    if posixpath.isabs(leads_to) or "\0" in leads_to or inner == ".." or inner.startswith("../"):
        what = f"holds a link that leads out of it: {name} -> {entry.target}"
        raise DataError(what, where=path, hint="pack it anew with the files themselves (tar --dereference)")
    link, target = top / name, Path(os.path.realpath(top / inner))
    link.parent.mkdir(parents=True, exist_ok=True)
    parent = Path(os.path.realpath(link.parent))
    if not target.is_relative_to(top) or not parent.is_relative_to(top):
        what = f"holds a link that leads out of it: {name} -> {entry.target}"
        raise DataError(what, where=path, hint="pack it anew with the files themselves (tar --dereference)")
    if target.is_file():
        link.unlink(missing_ok=True)
        try:
            os.link(target, link)
        except OSError:
            shutil.copyfile(target, link)
        return True
    if not target.is_dir() or link.exists():
        return link.exists()
    if parent.is_relative_to(target):
        return True  # a link to a folder that it lies in adds nothing
    link.symlink_to(os.path.relpath(target, parent), target_is_directory=True)
    return True


def _zip_entries(path: Path) -> Iterator[_Entry]:
    with _reading(path, "its list of files, which is at its end,"), zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    with zipfile.ZipFile(path) as archive:
        for info in infos:
            name, mode = _zip_name(info), stat.S_IFMT(info.external_attr >> 16)
            if info.flag_bits & 1:
                raise DataError("locked with a password", where=path, hint="unpack it and name the folder")
            if info.is_dir() or name.endswith("/"):
                yield _Entry(name=name, kind="folder")
            elif mode == stat.S_IFLNK:
                with _reading(path, name):
                    target = archive.open(info).read(1 << 12).decode(errors="surrogateescape")
                yield _Entry(name=name, kind="link", target=target)
            elif mode in {0, stat.S_IFREG}:
                yield _Entry(name=name, kind="file", size=info.file_size, open=lambda info=info: archive.open(info))  # type: ignore[misc]
            else:
                raise _special(path, name)


def _zip_name(info: zipfile.ZipInfo) -> str:
    """The path of an entry, with slashes. Tools write UTF-8 without saying so; zipfile takes that for code page 437."""
    name = info.filename
    if not info.flag_bits & 0x800:
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode()
    return name.replace("\\", "/")


def _declared_size(path: Path) -> int:
    with _reading(path, "its list of files, which is at its end,"), zipfile.ZipFile(path) as archive:
        return sum(info.file_size for info in archive.infolist())


class StrictMember(tarfile.TarInfo):
    """A header of a tar file. A broken one is an error: tarfile would take it for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "StrictMember":
        """Reads a header.

        Raises:
            ReadError: it is broken.
            HeaderError: the archive ends here.
        """
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if not buf or (len(buf) == tarfile.BLOCKSIZE and not any(buf)):
                raise
            raise tarfile.ReadError(f"a broken header ({error})") from None


def _tar_entries(path: Path) -> Iterator[_Entry]:
    with _reading(path, "its start"):
        archive = tarfile.open(path, tarinfo=StrictMember)  # noqa: SIM115  (closed below)
    with archive:
        while True:
            with _reading(path, "a header in it"):
                member = archive.next()
            if member is None:
                return
            archive.members.clear()  # type: ignore[attr-defined]  # millions of them would stay in memory
            if member.isdir():
                yield _Entry(name=member.name, kind="folder")
            elif member.issym() or member.islnk():
                kind: Literal["link", "hard link"] = "link" if member.issym() else "hard link"
                yield _Entry(name=member.name, kind=kind, target=member.linkname)
            elif member.isreg():
                opened = lambda member=member: archive.extractfile(member)  # noqa: E731
                yield _Entry(name=member.name, kind="file", size=member.size, open=opened)
            else:
                raise _special(path, member.name)


def _special(path: Path, name: str) -> DataError:
    what = f"holds {name!r}, which is a device or a pipe and no file of a dataset"
    return DataError(what, where=path, hint="pack the dataset's folder anew without it")


@contextlib.contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Turns what the libraries raise about a damaged archive into one error."""
    try:
        yield
    except _DAMAGED as error:
        if "compression" in str(error):
            told = f"{what} is compressed by a method that Python does not read ({error})"
            raise DataError(told, where=path, hint="unpack it with another tool and name the folder") from None
        raise _damaged(path, f"{what} cannot be read ({error})") from None


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"a damaged or cut off archive: {what}", where=path, hint="download or copy it again")
