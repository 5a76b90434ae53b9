"""The address of a dataset on the Hugging Face hub: `hf:user/name`, `hf:user/name@revision/configuration/split`."""

import re
from dataclasses import dataclass, replace
from urllib.parse import quote, unquote

from metr.errors import ConfigError

__all__ = ["HUB_PREFIX", "HubAddress", "is_hub_dataset", "same_dataset"]

HUB_PREFIX = "hf:"
"""What an address begins with."""
_FORM = "hf:user/name, hf:user/name@revision, hf:user/name/configuration/split"
_NAME = r"\w[\w.-]*"
# branches of the hub itself have slashes in their names; of others a slash is written %2F
_HUBS_OWN = r"refs/(?:convert|pr)/[^/]+"
_REVISION = rf"{_HUBS_OWN}|[^/]+"
_ADDRESS = re.compile(rf"({_NAME}/{_NAME})(?:@({_REVISION}))?(?:/([^/]+))?(?:/([^/]+))?/?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class HubAddress:
    """A dataset on the hub.

    Attributes:
        repository: Its name there, "user/name".
        revision: A branch, a tag or a commit; None for the newest of `main`.
        config: Which of the repository's configurations; None for its default or only one. Where `split` is None, it
            may be a split of that one.
        split: Which of its splits; None for all.
    """

    repository: str
    revision: str | None = None
    config: str | None = None
    split: str | None = None

    @classmethod
    def parsed(cls, text: str, where: object = None) -> "HubAddress":
        """The address that a text is.

        Raises:
            ConfigError: it is none.
        """
        found = _ADDRESS.fullmatch(text.removeprefix(HUB_PREFIX).removeprefix("datasets/"))
        if found is None:
            what = f"no name of a dataset on the hub: {text!r}"
            raise ConfigError(what, where=where, hint=f"{_FORM}; a slash in a revision is %2F")
        repository, *rest = found.groups()
        revision, config, split = (None if part is None else unquote(part) for part in rest)
        return cls(repository=repository, revision=revision, config=config, split=split)

    @property
    def name(self) -> str:
        """What the dataset is called by default: as its repository, without the user."""
        return self.repository.partition("/")[2]

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, whose files never change."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    def pinned(self, commit: str) -> "HubAddress":
        """The same at a commit."""
        return replace(self, revision=commit)

    def __str__(self) -> str:
        """As it is written."""
        revision = self.revision or ""
        revision = revision if re.fullmatch(_HUBS_OWN, revision) else quote(revision, safe="")
        parts = (part for part in (self.config, self.split) if part is not None)
        start = f"{HUB_PREFIX}{self.repository}{revision and '@'}{revision}"
        return "/".join([start, *(quote(part, safe="") for part in parts)])


def is_hub_dataset(path: object) -> bool:
    """Whether a path is the address of a dataset on the hub, by its beginning."""
    return isinstance(path, str) and path.startswith(HUB_PREFIX) and not path.startswith(f"{HUB_PREFIX}//")


def same_dataset(pinned: object, given: object) -> bool:
    """Whether an address that is given again is that of a run: of the run is known which commit the other one meant."""
    if not (isinstance(pinned, str) and isinstance(given, str) and is_hub_dataset(pinned) and is_hub_dataset(given)):
        return pinned == given
    before, now = HubAddress.parsed(pinned), HubAddress.parsed(given)
    return before == (now if now.is_pinned else replace(now, revision=before.revision))
