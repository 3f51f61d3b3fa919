"""Rows batches by several processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from itertools import islice

import pytest

from specforge.data.rows.maker import RowMaker
from specforge.data.rows.summary import RowSettings
from specforge.data.rows.workers import CHUNK, make_batches
from specforge.data.text.encoding import RowEncoder
from specforge.data.text.sources import read_raw_records
from specforge.errors import SpecforgeError, UsageError

MAKER = RowMaker(RowEncoder(None, 10), RowSettings(8, "truncate"))
STRICT_MAKER = RowMaker(RowEncoder(None, 10), RowSettings(8, "truncate", "refuse"))
ROW = {"input_ids": [1, 2], "loss_mask": [0, 1]}


def test_the_first_of_several_errors_is_reported(write_lines):
    rows = [ROW] * 2000
    rows[1900] = {"input_ids": [77], "loss_mask": [1]}
    rows[700] = {"input_ids": [55], "loss_mask": [1]}
    with pytest.raises(UsageError, match=r"train.jsonl:701: id 55"):
        list(make_batches(read_raw_records(write_lines(rows)), STRICT_MAKER, 2))
    assert not multiprocessing.active_children()


def test_the_source_is_read_only_a_little_ahead(write_lines):
    read = []
    records = (read.append(0) or record for record in read_raw_records(write_lines([ROW] * 5000)))
    batches = make_batches(records, MAKER, 2)
    assert [number for number, _ in islice(batches, 2)] == [CHUNK, CHUNK]
    assert len(read) <= 8 * CHUNK
    batches.close()


def test_a_killed_worker_is_reported(write_lines):
    batches = make_batches(read_raw_records(write_lines([ROW] * 5000)), MAKER, 2)
    next(batches)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(SpecforgeError, match="was killed, perhaps for lack of memory"):
        list(batches)
