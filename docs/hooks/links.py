"""Lets pages link to files of the repository by their relative path, which works on the site and in the repository.

Results that were measured (`benchmarks/results`) become part of the site; any other file is linked where the
repository is published. A link to a file that does not exist is a warning, so a strict build fails.
"""

import logging
import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

RESULTS = "benchmarks/results"
_SHOWN = {".png", ".jpg", ".json"}
_LINK = re.compile(r"(?<=\]\()(?:\.\./)+[^)\s#]+")
_log = logging.getLogger("mkdocs.hooks.links")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the images and numbers of the benchmarks."""
    root = _root(config)
    for path in sorted((root / RESULTS).iterdir()):
        if path.suffix in _SHOWN:
            relative = path.relative_to(root).as_posix()
            files.append(File.generated(config, relative, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites the links of a page that leave the folder of the documentation."""
    folder = PurePosixPath("docs", page.file.src_uri).parent

    def rewritten(link: re.Match[str]) -> str:
        target = os.path.normpath(folder / link.group())
        if target.startswith("docs/"):
            return link.group()
        if files.get_file_from_path(target) is not None:
            return os.path.relpath(target, PurePosixPath(page.file.src_uri).parent)
        if not (_root(config) / target).exists():
            _log.warning("%s links to %s, which does not exist", page.file.src_uri, target)
        return f"{config.repo_url}/blob/main/{target}"

    return _LINK.sub(rewritten, markdown)


def _root(config: MkDocsConfig) -> Path:
    return Path(config.config_file_path).parent
