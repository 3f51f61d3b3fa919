"""Origins of rows: reading, caching, and when they make an acceptance length a proxy."""

from __future__ import annotations

import json

import pytest

from specforge.data.rows.building import build_rows
from specforge.data.rows.summary import RowSettings
from specforge.data.text.origin import Origin, read_origin, why_proxy
from specforge.data.text.records import Record
from specforge.errors import UsageError

VALUES = {"model": "a verifier", "fingerprint": "abc", "temperature": 0.7, "top_k": 40, "top_p": 0.9}
GREEDY = Origin(model="a verifier", fingerprint="abc", temperature=0.0)
SAMPLED = Origin(**VALUES)


def test_an_origin_holds_the_sampling_settings():
    origin = read_origin(Record({"origin": {**VALUES, "seed": 3}}, "rows:1"))
    assert origin == SAMPLED
    assert (origin.sampling.temperature, origin.sampling.top_k, origin.sampling.top_p) == (0.7, 40, 0.9)


def test_a_row_may_have_no_origin():
    assert read_origin(Record({"text": "x"}, "rows:1")) is None
    assert read_origin(Record({"text": "x", "origin": None}, "rows:1")) is None


@pytest.mark.parametrize(
    ("origin", "named"),
    [("somebody", "origin"), ({**VALUES, "temperature": "warm"}, "temperature"), ({"model": "x"}, "fingerprint")],
)
def test_a_malformed_origin_is_refused_with_its_location(origin, named):
    with pytest.raises(UsageError, match=r"rows\.jsonl:4: origin") as error:
        read_origin(Record({"origin": origin}, "rows.jsonl:4"))
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("origins", "reason"),
    [
        ([GREEDY], None),
        ([SAMPLED], None),
        ([None], "do not state"),
        ([GREEDY, None], "do not state"),
        ([GREEDY, SAMPLED], "different settings"),
        ([GREEDY.model_copy(update={"fingerprint": "other"})], "a verifier (other), which is not this verifier (abc)"),
        ([GREEDY.model_copy(update={"fingerprint": "84cc7e1198794151"})], "of an earlier version of specforge"),
    ],
)
def test_acceptance_is_exact_only_for_a_single_origin_of_this_verifier(origins, reason):
    found = why_proxy(origins, "abc")
    assert (found is None) if reason is None else (reason in found)


def test_each_origin_is_kept_once_through_the_cache(tmp_path):
    rows = [{"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]} for _ in range(4)]
    for row, seed in zip(rows, (1, 2, 3), strict=False):
        row["origin"] = {**VALUES, "seed": seed}
    # A row without a supervised token is dropped, and its origin with it.
    rows.append({"input_ids": [1, 2], "loss_mask": [0, 0], "origin": {**VALUES, "fingerprint": "dropped"}})
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):  # written, then read from the cache
        built = build_rows(str(source), lambda: None, 9, RowSettings(8, "truncate"), tmp_path / "cache")
        assert built.summary.origins == [SAMPLED, None]
