"""Making rows in several processes, with results in source order and bounded memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice

from specforge.data.rows.maker import RowMaker, WrittenRows
from specforge.data.text.records import RawRecord
from specforge.errors import SpecforgeError

CHUNK = 256  # raw rows made and written at once
_AHEAD = 3  # chunks submitted per worker: enough that none waits for the reader
_Made = tuple[int, dict[str, WrittenRows]]
_maker: RowMaker


def make_batches(records: Iterator[RawRecord], maker: RowMaker, workers: int) -> Iterator[_Made]:
    """Yield, for each chunk of raw rows, the number of rows and what they add to each split.

    The chunks do not depend on the number of workers.

    Args:
        records: The raw rows.
        maker: Makes rows of them.
        workers: Number of processes; 1 means the current process.

    Raises:
        UsageError: A row is refused; if several are, names the first.
        SpecforgeError: A worker was killed.
    """
    chunks = iter(lambda: list(islice(records, CHUNK)), [])
    if workers == 1:
        for chunk in chunks:
            yield len(chunk), maker.make(chunk)
        return
    # Not forked: a fork would copy locks held by threads of tokenizers and torch, but not the threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(maker,))
    pending: deque[Future[_Made]] = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(_make, chunk))
            if len(pending) >= _AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise SpecforgeError(
            "a worker process was killed, perhaps for lack of memory; run the same command again to resume, "
            "with fewer --workers if memory is short"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(maker: RowMaker) -> None:
    global _maker
    _maker = maker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End the worker when its parent is killed; otherwise it would wait for chunks forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _make(chunk: Sequence[RawRecord]) -> _Made:
    return len(chunk), _maker.make(chunk)
