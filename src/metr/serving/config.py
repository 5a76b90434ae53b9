"""Configuration of the server: where it listens, and what one request and all together may take."""

from typing import Annotated

from pydantic import Field

from metr.config import Config
from metr.data.images import MAX_PIXELS


class ServeConfig(Config):
    """Where a detector listens, and its limits. They bound the memory that requests take together."""

    host: str = "127.0.0.1"
    """The address to listen at. The default is reached from this machine alone; 0.0.0.0 from everywhere."""
    port: Annotated[int, Field(ge=0, le=65_535)] = 8000
    """The port to listen at; 0 takes a free one."""
    max_megabytes: Annotated[float, Field(gt=0, le=1024)] = 16.0
    """Size of an image file, in millions of bytes, above which the answer is 413."""
    max_pixels: Annotated[int, Field(gt=0, le=MAX_PIXELS)] = MAX_PIXELS
    """Width times height of an image above which the answer is 413, before it is decoded."""
    max_requests: Annotated[int, Field(gt=0, le=10_000)] = 32
    """Requests in progress, waiting ones included, above which the answer is 503."""
    timeout: Annotated[float, Field(gt=0, le=3600)] = 30.0
    """Seconds from the beginning of a request after which the answer is 504."""
    max_names: Annotated[int, Field(gt=0, le=100_000)] = 1000
    """Names, or phrases of all names, that a request may ask for."""
    max_name_length: Annotated[int, Field(gt=0, le=10_000)] = 200
    """Characters of a name or phrase."""
    decoders: Annotated[int, Field(gt=0, le=64)] = 2
    """Images that are decoded at a time; of large ones, a single one."""

    @property
    def max_bytes(self) -> int:
        """Bytes of an image file."""
        return int(self.max_megabytes * 1e6)

    @property
    def max_body(self) -> int:
        """Bytes of a request: an image in base64 takes a third more, and there are names and names of fields."""
        return self.max_bytes * 4 // 3 + self.max_names * (self.max_name_length + 8) + 10_000
