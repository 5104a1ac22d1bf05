"""Lines of text in batches of whatever has arrived: what every recipe's ``predict`` reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from queue import Empty, SimpleQueue
from threading import Thread

BATCH = 64


def as_they_arrive(lines: Iterable[str]) -> Iterator[list[str]]:
    """Batches of the lines that are there: a file's are full, and a line from a pipe need not wait."""
    queue: SimpleQueue[str | BaseException | None] = SimpleQueue()

    def read() -> None:
        try:
            for line in lines:
                queue.put(line)
            queue.put(None)
        except BaseException as error:  # raised again in the consumer
            queue.put(error)

    Thread(target=read, daemon=True).start()
    while True:
        batch = [queue.get()]
        while batch[-1] is not None and len(batch) < BATCH:
            try:
                batch.append(queue.get_nowait())
            except Empty:
                break
        for item in batch:
            if isinstance(item, BaseException):
                raise item
        texts = [item for item in batch if isinstance(item, str)]
        if texts:
            yield texts
        if batch[-1] is None:
            return
