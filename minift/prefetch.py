"""Batches made ahead: while a GPU takes a step, a thread puts the next ones together.

A step of a small model on a GPU takes less time than Python needs for a batch and a step one after
the other. On a CPU a thread would only take a core from the step.
"""

import queue
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

from .batch import Batch

T = TypeVar("T")
AHEAD = 4  # steps


def prefetched(steps: Iterable[list[Batch]], device: torch.device) -> Iterator[list[Batch]]:
    """The micro-batches of each step; on their way to a GPU made by a thread, in pinned memory."""
    if device.type != "cuda":
        return iter(steps)
    return made_ahead(([batch.pinned() for batch in step] for step in steps), AHEAD)


def made_ahead(items: Iterable[T], ahead: int) -> Iterator[T]:
    """The same items, made by a thread that is at most `ahead` of them further than the caller.

    An exception comes after the items before it. The thread ends with the last item, and after the
    item it is at when the generator is closed.
    """
    made, room = queue.SimpleQueue(), threading.Semaphore(ahead)
    stopped = threading.Event()

    def work():
        try:
            source = iter(items)
            while room.acquire() and not stopped.is_set():
                made.put((next(source), None))
        except StopIteration:
            made.put((None, StopIteration))
        except BaseException as error:  # it is raised where it would have been
            made.put((None, error))

    thread = threading.Thread(target=work, name="minift batches", daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if error is StopIteration:
                return
            if error is not None:
                raise error
            room.release()
            yield item
    finally:
        stopped.set()
        room.release()
        if not sys.is_finalizing():  # then the thread is stopped wherever it is, and never ends
            thread.join()
