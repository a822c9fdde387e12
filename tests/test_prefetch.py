"""minift/prefetch.py: the same batches, and a thread that leaves no trace."""

import subprocess
import sys
import threading
import time

import pytest
import torch

from minift.batch import Batch, Batches, Example
from minift.prefetch import AHEAD, made_ahead, prefetched

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "minift batches"]


@pytest.fixture(autouse=True)
def no_thread_survives():
    assert not threads()
    yield
    assert not threads()


def eventually(condition) -> bool:
    """Whether it comes true within ten seconds; a thread is given time to go on."""
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    return condition()


def counted(n: int, seen: list[int]):
    for i in range(n):
        seen.append(i)
        yield i


@pytest.mark.parametrize("ahead", [1, 4])
@pytest.mark.parametrize("n", [0, 1, 3, 50])
def test_items_come_in_their_order(n, ahead):
    assert list(made_ahead(counted(n, []), ahead)) == list(range(n))


def test_items_are_made_by_a_thread_that_runs_ahead_so_far():
    """It makes `ahead` of them beyond the one in hand, and stops there."""
    seen = []
    items = made_ahead(counted(50, seen), 4)
    assert not threads()  # nothing is made before somebody asks
    assert next(items) == 0
    assert eventually(lambda: len(seen) == 5)
    time.sleep(0.05)
    assert len(seen) == 5
    assert len(threads()) == 1
    assert next(items) == 1
    assert eventually(lambda: len(seen) == 6)
    items.close()
    assert len(seen) == 6


def test_it_is_another_thread_and_ends_with_the_process():
    made_by = (threading.current_thread() for _ in range(2))
    for thread in made_ahead(made_by, 1):
        assert thread is not threading.current_thread()
        assert thread.daemon


@pytest.mark.parametrize("error", [ValueError("no such label"), KeyboardInterrupt()], ids=repr)
def test_an_exception_comes_where_it_would_have_been(error):
    """After the items before it, however far ahead it happened; it is the same one."""

    def items():
        yield from range(3)
        raise error

    made = made_ahead(items(), 10)
    assert next(made) == 0
    assert eventually(lambda: not threads())  # it is done, with all of them
    assert [next(made), next(made)] == [1, 2]
    with pytest.raises(type(error)) as raised:
        next(made)
    assert raised.value is error
    assert not threads()


@pytest.mark.parametrize("how", ["close", "throw", "drop", "break"])
def test_who_stops_early_leaves_no_thread(how):
    """While it waits for room; also when nobody closes the generator by name."""
    seen = []
    items = made_ahead(counted(10**9, seen), 2)
    assert next(items) == 0
    assert eventually(lambda: len(seen) == 3)
    if how == "close":
        items.close()
    elif how == "throw":
        with pytest.raises(RuntimeError, match="mine"):
            items.throw(RuntimeError("mine"))
    elif how == "drop":
        del items
    else:
        for _ in items:
            break
        del items
    assert not threads()
    assert len(seen) <= 4


def test_the_item_in_the_making_is_waited_for():
    """Closed in the middle of one: the thread makes it and no other."""
    begun, go, seen = threading.Event(), threading.Event(), []

    def items():
        yield 0
        for i in range(1, 9):
            seen.append(i)
            begun.set()
            assert go.wait(10)
            yield i

    made = made_ahead(items(), 4)
    assert next(made) == 0
    assert begun.wait(10)
    threading.Timer(0.05, go.set).start()
    made.close()
    assert seen == [1]


def test_a_program_may_end_with_items_in_the_making():
    """A generator that is still there when the interpreter goes waits for nobody."""
    code = """if True:
        import itertools
        from minift.prefetch import made_ahead
        items = made_ahead(itertools.count(), 3)
        print(next(items), next(items))
        """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 1\n", "")


# ---------------------------------------------------------------- batches


def batches() -> Batches:
    examples = [Example([5 + i % 7] * (2 + i % 5), [0] * (2 + i % 5), i % 2) for i in range(23)]
    return Batches(examples, 3, 2, seed=5)


def test_on_a_cpu_there_is_no_thread():
    steps = prefetched(batches().epoch(0), CPU)
    first = next(steps)
    assert not threads()
    assert [b.rows for b in first] == [b.rows for b in next(batches().epoch(0))]


def test_for_a_gpu_batches_are_pinned_by_the_thread(monkeypatch):
    """Every micro-batch of every step, and they are the same batches."""
    pinned = []

    def pin(batch):
        pinned.append(threading.current_thread())
        return batch.within(batch.memory.clone())

    monkeypatch.setattr(Batch, "pinned", pin)
    expected = list(batches().epoch(1))
    found = list(prefetched(batches().epoch(1), CUDA))
    assert len(found) == len(expected) > AHEAD - 1
    for a, b in zip(found, expected, strict=True):
        assert [x.rows for x in a] == [x.rows for x in b]
        assert all(torch.equal(x.memory, y.memory) for x, y in zip(a, b, strict=True))
    assert len(pinned) == sum(map(len, expected))
    assert threading.current_thread() not in pinned
