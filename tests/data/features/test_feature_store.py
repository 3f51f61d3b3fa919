"""Feature stores: what is read back, and that a store is complete or refused however a run ended."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from child_processes import files, in_child, status_of
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader

from specforge.data.features import preparing
from specforge.data.features.capturing import LiveStates
from specforge.data.features.dtypes import decode, encode
from specforge.data.features.importing import VllmStates
from specforge.data.features.manifest import FeatureNeeds, Manifest
from specforge.data.features.plan import ShardPlan
from specforge.data.features.preparing import prepare_features
from specforge.data.features.reading import read_from
from specforge.data.features.recording import FeatureRecorder
from specforge.data.features.store import FeatureStore
from specforge.data.packing import PackedRows, collate, pack
from specforge.data.rows.building import build_rows
from specforge.data.rows.reading import TokenRows
from specforge.data.rows.summary import RowSettings
from specforge.errors import SpecforgeError, UsageError
from specforge.files import locked
from specforge.models.chain.alignment import align
from specforge.verifier.features import capture

VOCABULARY = 61
WIDTH = 16
SETTINGS = RowSettings(max_length=64, long_rows="truncate")
NEEDS = FeatureNeeds("tiny", "0123456789abcdef", (2, 4), 8, WIDTH, whole_rows=False)


def row(number: int, trailing: int = 0) -> dict[str, Any]:
    """Return a row with random tokens and length; its ``trailing`` last tokens are not supervised."""
    generator = random.Random(number)
    length = generator.randint(5, 24)
    ids = [generator.randrange(3, VOCABULARY) for _ in range(length + trailing)]
    return {"input_ids": ids, "loss_mask": [0, 0] + [1] * (length - 2) + [0] * trailing}


def manifest_of(plan: ShardPlan, **options: Any) -> Manifest:
    needs = NEEDS
    manifest = Manifest(
        needs.verifier, needs.fingerprint, None, VOCABULARY, needs.layers, WIDTH, "float32", needs.whole_rows
    )
    return replace(manifest, rows_identity=plan.identity, **options)


@pytest.fixture(scope="module")
def run(tiny_verifiers: Mapping[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """States of a real verifier."""
    model = tiny_verifiers["llama"].model

    def states(input_ids: Tensor, position_ids: Tensor) -> Tensor:
        found = capture(model, input_ids, position_ids, [2, 4])
        return torch.cat([found.aux, found.last[:, :, None]], dim=2)

    return states


@pytest.fixture
def make_rows(write_lines, tmp_path) -> Callable[..., TokenRows]:
    def make(values: list[dict[str, Any]], name: str = "rows.jsonl") -> TokenRows:
        def no_tokenizer() -> Any:
            raise AssertionError("token rows need no tokenizer")

        return build_rows(write_lines(values, name), no_tokenizer, VOCABULARY, SETTINGS, tmp_path / "cache")

    return make


@pytest.fixture
def plan(make_rows) -> ShardPlan:
    """90 rows in about 30 shards."""
    return ShardPlan([make_rows([row(number) for number in range(90)])], NEEDS, token_bytes=192, shard_bytes=8192)


@pytest.fixture
def prepare(plan, run, tmp_path) -> Callable[..., FeatureStore]:
    def make(name: str = "store", **options: Any) -> FeatureStore:
        chosen = options.pop("plan", plan)
        prepare_features(chosen, manifest_of(chosen, **options), tmp_path / name, LiveStates(run, 128))
        return FeatureStore(tmp_path / name)

    return make


def expected_states(run: Any, rows: TokenRows, number: int) -> Tensor:
    ids = rows[number]["input_ids"][None]
    return run(ids, torch.arange(ids.shape[1])[None])[0]


class TestDtypes:
    states = st.lists(st.floats(-3e4, 3e4, width=32), min_size=1, max_size=40).map(
        lambda values: torch.tensor([values])
    )

    @given(states)
    def test_float8_error_is_bounded_by_three_bits_or_a_share_of_the_largest_value(self, x):
        values, scales = encode(x, torch.float8_e4m3fn)
        error = (decode(values, scales, torch.float32) - x).abs()
        assert (error <= torch.maximum(x.abs() / 16, scales[:, None] / 1024) * 1.001 + 1e-38).all()

    @given(states)
    def test_int8_is_off_by_half_a_step(self, x):
        values, scales = encode(x, torch.int8)
        assert torch.equal(scales, x.abs().amax(-1) / 127)
        assert ((decode(values, scales, torch.float32) - x).abs() <= scales[:, None] * 0.5001 + 1e-38).all()

    @given(states)
    def test_bfloat16_keeps_seven_bits_and_float32_all(self, x):
        values, scales = encode(x, torch.bfloat16)
        assert scales is None
        assert ((decode(values, None, torch.float32) - x).abs() <= x.abs() / 256 + 1e-38).all()
        assert torch.equal(decode(encode(x, torch.float32)[0], None, torch.float32), x)

    def test_each_token_and_layer_has_its_own_scale(self):
        x = torch.tensor([[[1.0, -0.5], [1000.0, 3.0]], [[0.0, 0.0], [1e-3, 1e-4]]])
        for dtype in (torch.float8_e4m3fn, torch.int8):
            values, scales = encode(x, dtype)
            assert scales.shape == (2, 2)
            assert decode(values, scales, torch.float32)[..., 0].flatten().tolist() == pytest.approx([1, 1000, 0, 1e-3])


class TestReading:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int8"])
    def test_every_row_has_the_states_of_the_verifier(self, plan, prepare, run, dtype):
        store = prepare(dtype=dtype)
        rows = plan.sources[0]
        indices = store.locate(rows.digests)
        assert len(store.manifest.shards) > 10
        for number in range(len(rows)):
            expected = expected_states(run, rows, number)
            for column, layer in enumerate((2, 4, 8)):
                values, scales = store.read(indices[number], layer)
                found = decode(values, scales, torch.float32)
                assert values.dtype == getattr(torch, dtype)
                bound = expected[:, column].abs().amax(-1, keepdim=True) * {"float32": 1e-5, "bfloat16": 1 / 200}.get(
                    dtype, 1 / 15
                )
                assert ((found - expected[:, column]).abs() <= bound).all()

    def test_batches_hold_the_states_of_their_documents_in_any_packing(self, plan, prepare, run):
        rows = plan.sources[0].select(np.random.default_rng(0).permutation(90)[:50])
        items = PackedRows(rows, pack(rows.lengths, 64))
        store = prepare()
        assert not read_from(store, NEEDS, items).any()
        for workers in (0, 2):
            loader = DataLoader(items, batch_size=3, collate_fn=collate, num_workers=workers)
            seen = 0
            for batch in loader:
                expected = run(batch["input_ids"], batch["position_ids"])
                inside = batch["document_ids"] >= 0
                seen += int(inside.sum())
                found = torch.cat([batch["aux"], batch["last"][:, :, None]], dim=2)
                torch.testing.assert_close(found[inside], expected[inside], rtol=1e-4, atol=1e-4)
                assert not found[~inside].any()
            assert seen == rows.lengths.sum()

    def test_a_worker_joins_states_in_shared_memory_once(self, plan, prepare):
        rows = plan.sources[0]
        items = PackedRows(rows, pack(rows.lengths, 64))
        assert not read_from(prepare(), NEEDS, items).any()

        def collated(chosen: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
            batch = collate(chosen)
            addresses = {one["aux"].data_ptr() for one in chosen}
            batch["copies"] = torch.tensor(int(batch["aux"].data_ptr() not in addresses))
            batch["shared"] = torch.tensor(batch["aux"].is_shared() and batch["last"].is_shared())
            return batch

        here, there = (next(iter(DataLoader(items, 1, collate_fn=collated, num_workers=number))) for number in (0, 1))
        assert there["shared"] and not there["copies"] and not here["shared"] and not here["copies"]
        tokens = here["input_ids"].numel()
        width = NEEDS.width * here["aux"].element_size()
        for batch in (here, there):
            assert batch["aux"].untyped_storage().nbytes() == tokens * len(NEEDS.aux_layers) * width
            assert batch["last"].untyped_storage().nbytes() == tokens * width

    def test_files_are_opened_once_per_process(self, plan, prepare, monkeypatch):
        from specforge.data.features import store as module

        store = prepare()
        assert len(store._shards) == len(store.manifest.shards)
        monkeypatch.setattr(module, "StoredShard", lambda path: pytest.fail("opened again"))
        for index in range(90):
            store.read(index, 8)
        monkeypatch.undo()
        other = pickle.loads(pickle.dumps(store))
        assert torch.equal(other.read(3, 8)[0], store.read(3, 8)[0])

    def test_missing_rows_are_reported(self, prepare, make_rows, plan):
        store = prepare()
        other = make_rows([row(5), row(1000), row(6)], "other.jsonl")
        assert (store.locate(other.digests) < 0).tolist() == [False, True, False]
        items = PackedRows(other, [[0, 2], [1]])
        assert read_from(store, NEEDS, items).tolist() == [False, True, False]
        assert "aux" in items[0] and "aux" not in items[1]
        assert "aux" not in collate([items[0], items[1]]), "all rows of a batch are read, or all are captured"

    @given(numbers=st.lists(st.integers(0, 119), min_size=1, max_size=8))
    def test_rows_are_found_by_their_tokens(self, numbers, prepare, make_rows, tmp_path):
        store = FeatureStore(tmp_path / "store") if (tmp_path / "store").exists() else prepare()
        rows = make_rows([row(number) for number in numbers], f"{'-'.join(map(str, numbers))}.jsonl")
        found = store.locate(rows.digests)
        assert [index >= 0 for index in found] == [number < 90 for number in numbers]
        assert all(store.kept[index] == rows.lengths[n] for n, index in enumerate(found) if index >= 0)


class TestPlan:
    def test_states_are_kept_up_to_one_token_after_the_last_supervised_one(self, make_rows):
        rows = make_rows([row(1, trailing=5), row(2, trailing=1), row(3)])
        plan = ShardPlan([rows], NEEDS, 192)
        assert plan.kept.tolist() == [rows.lengths[0] - 4, rows.lengths[1], rows.lengths[2]]
        assert ShardPlan([rows], replace(NEEDS, whole_rows=True), 192).kept.tolist() == rows.lengths.tolist()

    @given(
        mask=st.lists(st.booleans(), min_size=1, max_size=20).filter(any),
        steps=st.integers(1, 6),
        supervision=st.sampled_from(["exact", "compat"]),
    )
    def test_no_step_reads_a_state_that_is_not_kept(self, mask, steps, supervision):
        flags = torch.tensor([mask])
        alignment = align(flags, torch.zeros(1, len(mask), dtype=torch.int64), steps, supervision)
        kept = int(NEEDS.kept(np.array(len(mask)), np.array(len(mask) - 1 - mask[::-1].index(True))))
        rows = alignment.supervised.any(0).nonzero()[:, 1]
        targets = alignment.targets[alignment.supervised]
        assert all(index < kept for index in [*rows.tolist(), *targets.tolist()])

    def test_equal_rows_are_kept_once_with_the_longest_length_read(self, make_rows):
        long, short = row(1), row(1)
        short["loss_mask"] = [0, 1, 1] + [0] * (len(short["input_ids"]) - 3)
        plan = ShardPlan(
            [make_rows([row(2), short], "a.jsonl"), make_rows([long, row(2), row(3)], "b.jsonl")], NEEDS, 192
        )
        assert plan.rows.tolist() == [[0, 0], [0, 1], [1, 2]]
        assert plan.kept[1] == len(long["input_ids"])

    def test_each_row_is_in_one_shard(self, plan):
        assert [number for shard in plan.shards for number in shard] == list(range(90))
        sizes = [int(plan.kept[shard].sum()) * 192 for shard in plan.shards]
        assert max(sizes) <= 8192 + 24 * 192 and len(sizes) > 10

    def test_states_of_the_kept_tokens_do_not_depend_on_the_rest(self, make_rows, run, tmp_path):
        rows = make_rows([row(number, trailing=6) for number in range(12)])
        plan = ShardPlan([rows], NEEDS, 192)
        prepare_features(plan, manifest_of(plan), tmp_path / "store", LiveStates(run, 64))
        store = FeatureStore(tmp_path / "store")
        for number, index in enumerate(store.locate(rows.digests)):
            found = store.read(index, 8)[0]
            assert len(found) == rows.lengths[number] - 5
            torch.testing.assert_close(found, expected_states(run, rows, number)[: len(found), 2], rtol=1e-4, atol=1e-4)


class TestRefusals:
    @pytest.mark.parametrize(
        ("needs", "message"),
        [
            ({"fingerprint": "f" * 16, "verifier": "other"}, r"another verifier: tiny \(0123.*\), not other \(ffff"),
            ({"aux_layers": (2, 5)}, r"lacks layers \[5\] \(it has \[2, 4, 8\]\)"),
            ({"whole_rows": True}, "trains on whole rows"),
        ],
    )
    def test_a_mismatched_store_is_refused(self, plan, needs, message):
        with pytest.raises(UsageError, match=f"^data.features: folder .*{message}"):
            manifest_of(plan).require(replace(NEEDS, **needs), None, "data.features: folder")

    def test_a_store_of_another_tokenizer_is_refused(self, plan):
        with pytest.raises(UsageError, match=r"another tokenizer or chat template \(aa\) than that of tiny \(bb\)"):
            manifest_of(plan, tokenizer="aa").require(NEEDS, "bb", "data.features: folder")
        manifest_of(plan, tokenizer="aa").require(NEEDS, None, "data.features: folder")

    def test_a_subset_of_the_stored_layers_is_accepted(self, plan):
        manifest_of(plan).require(replace(NEEDS, aux_layers=()), None, "data.features: folder")

    def test_a_missing_or_truncated_shard_is_named_and_written_again(self, prepare, tmp_path, plan):
        prepare("undisturbed")
        prepare()
        shard = tmp_path / "store" / "shard-00003.safetensors"
        for harm, message in (
            (lambda: os.truncate(shard, 500), "has 500 bytes instead of"),
            (shard.unlink, "is missing"),
        ):
            harm()
            with pytest.raises(UsageError, match=rf"shard-00003.safetensors {message}"):
                FeatureStore(tmp_path / "store")
            prepare()
            assert files(tmp_path / "store") == files(tmp_path / "undisturbed")

    def test_checksums_find_a_changed_byte(self, prepare, tmp_path):
        prepare().check()
        path = tmp_path / "store" / "shard-00002.safetensors"
        content = bytearray(path.read_bytes())
        content[-100] ^= 1
        path.write_bytes(content)
        with pytest.raises(
            SpecforgeError, match=r"shard-00002.safetensors is damaged: the checksum of the states of row"
        ):
            FeatureStore(tmp_path / "store").check()

    @pytest.mark.parametrize("harm", ["{", "{}", '{"format": 2, "convention": "", "shards": [{}]}', "[]"])
    def test_a_damaged_manifest_is_named(self, prepare, tmp_path, harm):
        prepare()
        (tmp_path / "store" / "manifest.json").write_text(harm)
        with pytest.raises(UsageError, match=r"manifest.json is damaged"):
            FeatureStore(tmp_path / "store")
        assert len(prepare().manifest.shards) > 10, "the same command writes it again"

    def test_another_format_an_unfinished_store_and_no_store_are_distinguished(self, prepare, tmp_path):
        prepare()
        manifest = tmp_path / "store" / "manifest.json"
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 7}))
        with pytest.raises(UsageError, match="another format"):
            FeatureStore(tmp_path / "store")
        manifest.unlink()
        with pytest.raises(UsageError, match="is not finished; run its command again"):
            FeatureStore(tmp_path / "store")
        with pytest.raises(UsageError, match="is not a feature store"):
            FeatureStore(tmp_path)

    def test_a_folder_with_other_content_is_not_touched(self, prepare, tmp_path, plan, make_rows):
        prepare()
        before = files(tmp_path / "store")
        other = ShardPlan([make_rows([row(1)], "other.jsonl")], NEEDS, 192)
        for options in ({"plan": other}, {"dtype": "bfloat16"}, {"fingerprint": "f" * 16}):
            with pytest.raises(UsageError, match="holds features of something else"):
                prepare(**options)
        assert files(tmp_path / "store") == before
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "thesis.txt").write_text("years of work")
        with pytest.raises(UsageError, match="holds something else"):
            prepare("home")
        assert files(tmp_path / "home") == {"thesis.txt": b"years of work"}

    def test_non_finite_states_are_not_stored(self, plan, tmp_path):
        def broken(input_ids: Tensor, position_ids: Tensor) -> Tensor:
            return torch.full((*input_ids.shape, 3, WIDTH), torch.inf)

        with pytest.raises(SpecforgeError, match="not all finite"):
            prepare_features(plan, manifest_of(plan), tmp_path / "store", LiveStates(broken, 64))
        assert not files(tmp_path / "store")


class TestInterruptedRuns:
    @pytest.mark.parametrize("seed", range(3))
    def test_a_run_killed_at_random_moments_gives_the_store_of_an_undisturbed_run(self, prepare, tmp_path, seed):
        generator = random.Random(seed)
        begin = time.monotonic()
        prepare("undisturbed")
        duration = time.monotonic() - begin
        kills = 0
        while kills < 7:
            child = in_child(prepare)
            time.sleep(generator.uniform(0, 0.5 * duration))
            os.kill(child, signal.SIGKILL)
            if status_of(child) == -signal.SIGKILL:
                kills += 1
            else:  # it finished first; start over
                shutil.rmtree(tmp_path / "store")
        prepare()
        assert files(tmp_path / "store") == files(tmp_path / "undisturbed")

    @pytest.mark.parametrize("function", ["fsync", "replace"])
    @pytest.mark.parametrize("call", [0, 4, -1])
    def test_a_run_killed_around_a_write_does_too(self, prepare, plan, tmp_path, monkeypatch, function, call):
        real, calls = getattr(os, function), []
        last = len(plan.shards) * (2 if function == "fsync" else 1)  # the first call for the manifest

        def end(*arguments: Any) -> None:
            if len(calls) == (last if call < 0 else call):
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(0)
            real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, function, end)
            assert status_of(in_child(prepare)) == -signal.SIGKILL
        assert not (tmp_path / "store" / "manifest.json").exists()
        prepare()
        prepare("undisturbed")
        assert files(tmp_path / "store") == files(tmp_path / "undisturbed")

    def test_partial_files_of_safetensors_are_removed(self, prepare, tmp_path):
        (tmp_path / "store").mkdir()
        (tmp_path / "store" / ".tmpA1b2C3").write_bytes(b"half")
        prepare()
        prepare("undisturbed")
        assert files(tmp_path / "store") == files(tmp_path / "undisturbed")

    def test_finished_shards_are_kept(self, plan, prepare, run, tmp_path, caplog):
        def interrupted(chosen: ShardPlan, shard: range) -> Iterator[tuple[int, Tensor]]:
            if shard.start > 40:
                raise KeyboardInterrupt
            return LiveStates(run, 128)(chosen, shard)

        with pytest.raises(KeyboardInterrupt):
            prepare_features(plan, manifest_of(plan), tmp_path / "store", interrupted)
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").glob("shard-*")}
        assert 5 < len(before) < len(plan.shards)
        prepare()
        assert all(path.stat().st_mtime_ns == at for path, at in before.items())
        assert "resuming after" in caplog.text

    def test_a_full_disk_is_reported_and_the_run_resumes_when_there_is_room(self, prepare, plan, tmp_path, capfd):
        largest = max(int(plan.kept[shard].sum()) for shard in plan.shards) * 192

        def with_little_room() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
            prepare()

        assert status_of(in_child(with_little_room)) == 11
        assert "cannot write" in capfd.readouterr().out
        assert not (tmp_path / "store" / "manifest.json").exists()
        prepare()
        prepare("undisturbed")
        assert files(tmp_path / "store") == files(tmp_path / "undisturbed")


class TestSeveralProcesses:
    def test_each_process_writes_shards_that_the_others_do_not(self, plan, run, prepare, tmp_path, monkeypatch):
        def prepare_store() -> None:
            # Appended in one call, so that lines of several processes do not mix.
            def note(path: Path, *arguments: Any) -> None:
                with (tmp_path / "written.txt").open("a") as file:
                    file.write(f"{os.getpid()} {path.name}\n")
                real(path, *arguments)

            real = preparing.write_shard
            monkeypatch.setattr(preparing, "write_shard", note)
            prepare_features(plan, manifest_of(plan), tmp_path / "store", LiveStates(run, 128))

        assert [status_of(child) for child in [in_child(prepare_store) for _ in range(3)]] == [0, 0, 0]
        written = [line.split() for line in (tmp_path / "written.txt").read_text().splitlines()]
        assert len({name for _, name in written}) == len(written), "no shard is written twice"
        assert len({process for process, _ in written}) > 1
        prepare("undisturbed")
        assert files(tmp_path / "store") == files(tmp_path / "undisturbed")

    def test_a_shard_locked_by_another_process_is_left_to_it(self, plan, run, prepare, tmp_path):
        (tmp_path / "store").mkdir()
        with locked(tmp_path / "store" / "shard-00004.safetensors"):
            states = LiveStates(run, 128)
            assert prepare_features(plan, manifest_of(plan), tmp_path / "store", states) is None
            there = {path.name for path in (tmp_path / "store").glob("shard-*")}
            assert len(there) == len(plan.shards) - 1 and "shard-00004.safetensors" not in there
        assert len(prepare().manifest.shards) == len(plan.shards)


class TestVllmStates:
    @pytest.fixture
    def served(self, plan, run, tmp_path) -> Path:
        """Files that a server would write for the rows, in arbitrary order and with arbitrary names."""
        (tmp_path / "served").mkdir()
        for number in random.Random(0).sample(range(90), 90):
            tokens = plan.sources[0][number]["input_ids"]
            states = run(tokens[None], torch.arange(len(tokens))[None])[0].to(torch.bfloat16)
            file = tmp_path / "served" / f"cmpl-{number * 7919 % 1000}.safetensors"
            save_file({"hidden_states": states.contiguous(), "token_ids": tokens}, file)
            file.with_suffix(".lock").touch()
        return tmp_path / "served"

    def test_gives_the_same_store_as_the_verifier(self, plan, served, prepare, tmp_path):
        manifest = manifest_of(plan, dtype="bfloat16")
        states = VllmStates(served, plan, manifest.layers, WIDTH, tmp_path / "index.npz")
        prepare_features(plan, manifest, tmp_path / "imported", states)
        imported, own = FeatureStore(tmp_path / "imported"), prepare()
        for index in range(90):
            for layer in (2, 4, 8):
                torch.testing.assert_close(
                    imported.read(index, layer)[0].float(), own.read(index, layer)[0], rtol=1e-2, atol=1e-3
                )

    def test_scaled_values_are_multiplied(self, make_rows, tmp_path):
        plan = ShardPlan([make_rows([row(1)])], NEEDS, 192)
        tokens = plan.sources[0][0]["input_ids"]
        values = torch.ones(len(tokens), 3, WIDTH).to(torch.float8_e4m3fn)
        scales = torch.arange(1.0, len(tokens) + 1)[:, None, None]
        content = {"hidden_states": values, "hidden_states_scales": scales, "token_ids": tokens}
        save_file(content, tmp_path / "hs_0.safetensors")
        [(number, found)] = VllmStates(tmp_path, plan, [2, 4, 8], WIDTH, tmp_path / "index.npz")(plan, range(1))
        assert number == 0 and torch.equal(found, scales.expand(-1, 3, WIDTH))

    def test_rows_that_were_not_requested_are_counted(self, plan, served, tmp_path):
        for path in sorted(served.glob("*.safetensors"))[:2]:
            path.unlink()
        with pytest.raises(UsageError, match=r"no file with the tokens of 2 of the 90 rows \(first: row"):
            VllmStates(served, plan, [2, 4, 8], WIDTH, tmp_path / "index.npz")

    def test_other_layers_are_refused(self, plan, served, tmp_path):
        with pytest.raises(UsageError, match=r"start the server with eagle_aux_hidden_state_layer_ids \[1, 2, 4, 8\]"):
            list(VllmStates(served, plan, [1, 2, 4, 8], WIDTH, tmp_path / "index.npz")(plan, range(1)))

    def test_damaged_and_unfinished_files_and_empty_folders_are_refused(self, plan, served, tmp_path):
        path = sorted(served.glob("*.safetensors"))[0]
        with path.with_suffix(".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(SpecforgeError, match="is still being written"):
                VllmStates(served, plan, [2, 4, 8], WIDTH, tmp_path / "index.npz")
        os.truncate(path, 50)
        with pytest.raises(SpecforgeError, match=f"{path.name} is damaged"):
            VllmStates(served, plan, [2, 4, 8], WIDTH, tmp_path / "index.npz")
        with pytest.raises(UsageError, match=r"holds no .safetensors files"):
            VllmStates(tmp_path / "cache", plan, [2, 4, 8], WIDTH, tmp_path / "index.npz")

    def test_files_are_indexed_once(self, plan, served, tmp_path):
        """Of a second run, or another process, only new files are read; removed ones are missing again."""

        def states() -> VllmStates:
            return VllmStates(served, plan, [2, 4, 8], WIDTH, tmp_path / "index.npz")

        first, second, *others = sorted(served.glob("*.safetensors"))
        whole = dict(states()(plan, range(90)))
        contents = {path: path.read_bytes() for path in (first, second)}
        for path in others:
            path.chmod(0o000) if os.getuid() else os.truncate(path, 3)  # nobody reads it
        first.unlink()
        with pytest.raises(UsageError, match="no file with the tokens of 1 of the 90 rows"):
            states()
        (served / "again.safetensors").write_bytes(contents[first])
        again = states()
        assert len(whole) == 90
        # A file whose content is exchanged is noticed when it is read.
        second.write_bytes(contents[first])
        number = next(number for number in range(90) if again._names[plan.digests[number].tobytes()] == second.name)
        with pytest.raises(SpecforgeError, match=f"{second.name} was replaced after"):
            list(again(plan, range(number, number + 1)))

    @pytest.mark.parametrize("damage", [b"", b"PK", b"\x00" * 100])
    def test_a_damaged_index_is_made_again(self, plan, served, tmp_path, damage):
        index = tmp_path / "index.npz"
        VllmStates(served, plan, [2, 4, 8], WIDTH, index)
        before = index.read_bytes()
        index.write_bytes(damage)
        VllmStates(served, plan, [2, 4, 8], WIDTH, index)
        assert len(index.read_bytes()) == len(before)


class TestRecording:
    @pytest.fixture
    def items(self, plan) -> PackedRows:
        rows = plan.sources[0]
        return PackedRows(rows, pack(rows.lengths, 64))

    def recorder(self, plan: ShardPlan, items: PackedRows, folder: Path) -> FeatureRecorder:
        manifest = replace(manifest_of(plan), rows_identity="")
        return FeatureRecorder(folder, manifest, NEEDS, {"train": items})

    def add(self, recorder: FeatureRecorder, run: Any, batch: dict[str, Tensor]) -> None:
        states = run(batch["input_ids"], batch["position_ids"])
        recorder.add(batch, states[:, :, :2], states[:, :, 2])

    def test_recorded_rows_are_read_afterwards(self, plan, items, run, tmp_path):
        recorder = self.recorder(plan, items, tmp_path / "recorded")
        assert not recorder.reopen()
        assert "last" not in items[0]
        batches = [collate([items[number], items[number + 1]]) for number in range(0, len(items) - 1, 2)]
        for batch in batches[:5]:
            self.add(recorder, run, batch)
        recorder.flush()
        assert not recorder.reopen()
        assert [("last" in items[number]) for number in range(12)] == [True] * 10 + [False] * 2
        # Another process continues and sees rows twice.
        other = self.recorder(plan, items, tmp_path / "recorded")
        other.reopen()
        for batch in batches:
            self.add(other, run, batch)
        other.flush()
        other.reopen()
        for number in range(len(items) // 2 * 2):
            item = items[number]
            found = torch.cat([item["aux"], item["last"][:, None]], dim=1)
            expected = run(item["input_ids"][None], item["position_ids"][None])[0]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        store = other.store.open()
        assert store is not None
        assert len(store.kept) == sum(len(items.bins[number]) for number in range(len(items) // 2 * 2))

    def test_tokens_that_match_no_row_are_not_recorded(self, plan, items, run, tmp_path):
        recorder = self.recorder(plan, items, tmp_path / "recorded")
        recorder.reopen()
        batch = collate([items[0]])
        self.add(recorder, run, {**batch, "input_ids": batch["input_ids"].flip(1)})
        recorder.flush()
        assert not (tmp_path / "recorded").exists()

    def test_a_damaged_shard_is_captured_again(self, plan, items, run, tmp_path, caplog):
        recorder = self.recorder(plan, items, tmp_path / "recorded")
        recorder.reopen()
        for number in (0, 1):
            self.add(recorder, run, collate([items[number]]))
            recorder.flush()
        first, _ = sorted((tmp_path / "recorded").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        os.truncate(first, 300)
        recorder.reopen()
        assert "captured again" in caplog.text
        assert "last" not in items[0] and "last" in items[1]

    def test_a_full_disk_ends_recording_but_not_training(self, plan, items, run, tmp_path, capfd):
        def with_little_room() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            recorder = self.recorder(plan, items, tmp_path / "recorded")
            recorder.reopen()
            for number in (0, 1):
                self.add(recorder, run, collate([items[number]]))
                recorder.flush()

        assert status_of(in_child(with_little_room)) == 0
        assert not files(tmp_path / "recorded")


def test_digests_and_last_supervised_tokens(write_lines, make_rows, tmp_path):
    rows = make_rows([row(number, trailing=number % 4) for number in range(50)])
    assert rows.last_supervised.tolist() == [int(rows[n]["loss_mask"].nonzero().max()) for n in range(50)]
    assert len({digest.tobytes() for digest in rows.digests}) == 50
    assert (rows.select(np.array([7, 3])).digests == rows.digests[[7, 3]]).all()
