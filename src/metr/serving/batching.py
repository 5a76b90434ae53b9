"""Requests that wait together are worked on together."""

import asyncio
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Batcher"]

KeyT = TypeVar("KeyT", bound=Hashable)
ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, kw_only=True)
class _Waiting(Generic[KeyT, ItemT, ResultT]):
    """An item whose caller waits for `result`."""

    key: KeyT
    item: ItemT
    result: "asyncio.Future[ResultT]"


class Batcher(Generic[KeyT, ItemT, ResultT]):
    """Collects items while one thread works, and then hands those of one key over together, the oldest key first.

    No item waits for others to come. Items whose callers have given up are left out.

    Args:
        work: Called in a thread of its own, never twice at a time: the results of items that share a key.
        size: Number of items at a time.
    """

    def __init__(self, work: Callable[[KeyT, Sequence[ItemT]], Sequence[ResultT]], size: int) -> None:
        self._work, self._size = work, size
        self._waiting: deque[_Waiting[KeyT, ItemT, ResultT]] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="detector")
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Batcher[KeyT, ItemT, ResultT]":
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None, "used as a context manager"
        self._task.cancel()
        for one in self._waiting:
            one.result.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def submit(self, key: KeyT, item: ItemT) -> ResultT:
        """The result of an item; raises what `work` raised for its batch."""
        result: asyncio.Future[ResultT] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(key=key, item=item, result=result))
        self._arrived.set()
        return await result

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            batch = self._next_batch()
            if not batch:
                self._arrived.clear()
                continue
            try:
                items = [one.item for one in batch]
                results = await loop.run_in_executor(self._thread, self._work, batch[0].key, items)
            except Exception as error:  # told to those who wait; the next batch may do
                for one in batch:
                    if not one.result.done():
                        one.result.set_exception(error)
            else:
                for one, result in zip(batch, results, strict=True):
                    if not one.result.done():
                        one.result.set_result(result)

    def _next_batch(self) -> list[_Waiting[KeyT, ItemT, ResultT]]:
        """The oldest items with the key of the oldest of all; the others keep waiting in their order."""
        waiting = [one for one in self._waiting if not one.result.done()]
        batch = [one for one in waiting if one.key == waiting[0].key][: self._size]
        taken = {id(one) for one in batch}
        self._waiting = deque(one for one in waiting if id(one) not in taken)
        return batch
