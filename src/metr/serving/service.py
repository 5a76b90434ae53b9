"""What the server does with a request: bytes become an image, names a predictor, and waiting images one batch."""

import asyncio
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from metr.data.images import header_of, read_image
from metr.data.records import InMemoryBytes
from metr.errors import ConfigError, DataError, MetrError
from metr.inference.config import InferenceConfig
from metr.inference.predictor import Prediction, Predictor, PreparedImage
from metr.serving.batching import Batcher
from metr.serving.config import ServeConfig
from metr.structures import Detections
from metr.text.same_names import in_another_case
from metr.text.vocabulary import Vocabulary, listed_names

if TYPE_CHECKING:
    from metr.model import METR, Names

__all__ = ["Answer", "Service", "TooLargeError"]

_logger = logging.getLogger(__name__)
# lists of names whose predictors are kept
_PREDICTORS = 32
# images of more pixels are decoded one at a time: each may take 2 GB
_LARGE = 1 << 24
# what messages call the image of a request
_IMAGE = "image"


class TooLargeError(MetrError):
    """A request, or the image in it, is larger than the server takes."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was found in an image of `size` (height, width) pixels; `untrained` are names that were not trained."""

    size: tuple[int, int]
    detections: Detections
    untrained: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A list of names that can be compared: as JSON; None asks for the detector's default names."""

    names: str | None

    @classmethod
    def of(cls, names: "Names | None") -> "_Asked":
        given = names if names is None or isinstance(names, Mapping) else list(names)
        return cls(names=None if given is None else json.dumps(given))

    def read(self) -> "Names | None":
        names: Names | None = None if self.names is None else json.loads(self.names)
        return names


class Service:
    """A detector that many ask at the same time, as an asynchronous context manager.

    An answer is what `METR.detect` gives for the image alone. The detector works in one thread; images are decoded in
    others, large ones one after the other.

    Args:
        model: The detector. From now on it keeps nothing of names that were not trained (`METR.keeps`).
        inference: Batch size and settings of detection.
        config: The limits.
    """

    def __init__(self, model: "METR", inference: InferenceConfig | None = None, config: ServeConfig | None = None):
        self.model, self.config = model, config or ServeConfig()
        self.model.keeps = False
        self.inference = inference or InferenceConfig()
        self._default = model.predictor(None, self.inference)
        self._predictors: OrderedDict[_Asked, tuple[Predictor, tuple[str, ...]]] = OrderedDict()
        self._large = threading.Lock()
        self._batcher: Batcher[_Asked, PreparedImage, tuple[Prediction, tuple[str, ...]]]

    async def __aenter__(self) -> "Service":
        self._decoding = asyncio.Semaphore(self.config.decoders)
        self._decoders = ThreadPoolExecutor(self.config.decoders, thread_name_prefix="decoder")
        self._batcher = await Batcher(self._detect, self.inference.batch_size).__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._batcher.__aexit__()
        self._decoders.shutdown(wait=False, cancel_futures=True)

    async def answer(self, image: bytes, names: "Names | None" = None, threshold: float | None = None) -> Answer:
        """What is in an image.

        Args:
            image: The bytes of an image file.
            names: What to look for, "all" alone for every trained name; by default the detector's default names.
            threshold: The least score; by default that of each name.

        Raises:
            TooLargeError: the image has too many bytes or pixels.
            DataError: the image cannot be read.
            ConfigError: a name is empty, too long or given twice; there are too many; or the threshold is not in 0..1.
        """
        self._check(names)
        if not isinstance(names, Mapping | None) and [*names] == ["all"]:
            names = self.model.names
        thresholds = self.model.thresholds(threshold, names)
        if len(image) > self.config.max_bytes:
            raise TooLargeError(f"expected at most {self.config.max_bytes:,} bytes, found {len(image):,}", where=_IMAGE)
        prepared = await self._prepared(image)
        del image
        found, untrained = await self._batcher.submit(_Asked.of(names), prepared)
        assert found.detections is not None
        return Answer(size=prepared.size, detections=thresholds.shown(found.detections), untrained=untrained)

    def _check(self, names: "Names | None") -> None:
        """Refuses more names, or longer ones, than the limits allow."""
        if names is None:
            return
        listed_names(names)
        texts = (
            [*names] + [phrase for some in names.values() for phrase in some] if isinstance(names, Mapping) else names
        )
        if len(texts) > self.config.max_names:
            raise ConfigError(f"expected at most {self.config.max_names:,}, found {len(texts):,}", where="names")
        if any(len(text) > self.config.max_name_length for text in texts):
            raise ConfigError(f"expected at most {self.config.max_name_length:,} characters each", where="names")
        if any("\ud800" <= letter <= "\udfff" for text in texts for letter in text):
            raise ConfigError("expected text, found halves of characters", where="names")

    async def _prepared(self, image: bytes) -> PreparedImage:
        """An image as it enters the network. A decoder that nobody waits for any more still counts as busy."""
        await self._decoding.acquire()
        try:
            done = self._decoders.submit(self._decode, image)
        except BaseException:
            self._decoding.release()
            raise
        del image
        loop = asyncio.get_running_loop()

        def free(_: "Future[PreparedImage]") -> None:
            with suppress(RuntimeError):  # the server has ended meanwhile
                loop.call_soon_threadsafe(self._decoding.release)

        done.add_done_callback(free)
        return await asyncio.wrap_future(done)

    def _decode(self, image: bytes) -> PreparedImage:
        """Decodes and resizes an image; runs in a decoder's thread.

        Raises:
            TooLargeError: it has too many pixels.
            DataError: it cannot be decoded, whatever the reason.
        """
        try:
            large = self._pixels(image) > _LARGE
            with self._large if large else nullcontext():
                return self._default.prepare(read_image(Path(_IMAGE), InMemoryBytes(image)))
        except MetrError:
            raise
        except Exception as error:  # no image may end in an error of the server
            _logger.exception("an image could not be decoded, in a way that is not foreseen")
            raise DataError(f"an image that cannot be decoded ({type(error).__name__})", where=_IMAGE) from None

    def _pixels(self, image: bytes) -> int:
        """Number of pixels of an image, by its header; refuses too many of them."""
        height, width = header_of(image, _IMAGE)[1].stored_size
        if height * width > self.config.max_pixels:
            what = f"expected at most {self.config.max_pixels:,} pixels, found {width} x {height}"
            raise TooLargeError(what, where=_IMAGE, hint="scale the image down")
        return height * width

    def _detect(self, asked: _Asked, images: Sequence[PreparedImage]) -> Sequence[tuple[Prediction, tuple[str, ...]]]:
        """The detections of images that are asked for the same names; runs in the detector's thread."""
        predictor, untrained = self._predictor(asked)
        return [(one, untrained) for one in predictor.detect_prepared(images)]

    def _predictor(self, asked: _Asked) -> tuple[Predictor, tuple[str, ...]]:
        """The predictor for some names, and which of them were not trained; the last used ones are kept."""
        names = asked.read()
        if names is None:
            return self._default, ()
        if asked not in self._predictors:
            predictor = self.model.predictor(names, self.inference)
            self._predictors[asked] = predictor, self._untrained(names)
            if len(self._predictors) > _PREDICTORS:
                self._predictors.popitem(last=False)
        self._predictors.move_to_end(asked)
        return self._predictors[asked]

    def _untrained(self, names: "Names") -> tuple[str, ...]:
        if isinstance(names, Mapping):  # described by phrases, which need not be names
            return ()
        trained = in_another_case(names, self.model.names)
        fresh = [name for name in names if name not in trained]
        return tuple(str(one) for one in self.model.untrained(Vocabulary.of(fresh))) if fresh else ()
