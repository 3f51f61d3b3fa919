"""Raw rows through a maker on several processes: results come in the order of the source, memory stays bounded."""

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
_AHEAD = 3  # chunks handed out for each worker: enough that none waits for the reader
_Made = tuple[int, dict[str, WrittenRows]]
_maker: RowMaker


def make_batches(records: Iterator[RawRecord], maker: RowMaker, workers: int) -> Iterator[_Made]:
    """Yield for each chunk of raw rows their number, and what they add to each split.

    The chunks do not depend on the number of workers.

    Args:
        records: the raw rows.
        maker: makes rows of them.
        workers: processes; with 1, this one does it all.

    Raises:
        UsageError: a row is refused; of several, the first.
        SpecforgeError: a worker came to an end that was not its own.
    """
    chunks = iter(lambda: list(islice(records, CHUNK)), [])
    if workers == 1:
        for chunk in chunks:
            yield len(chunk), maker.make(chunk)
        return
    # Not forked: threads of tokenizers and torch would not come along, but the locks that they hold would.
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
            "a worker process was ended from outside, perhaps for lack of memory; run the same command again to go on, "
            "with fewer --workers if memory is short"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(maker: RowMaker) -> None:
    global _maker
    _maker = maker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without this, workers of a parent that was killed would wait for chunks for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _make(chunk: Sequence[RawRecord]) -> _Made:
    return len(chunk), _maker.make(chunk)
