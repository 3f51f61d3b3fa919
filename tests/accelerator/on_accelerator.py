"""Commands and drafts on the simulated device, run by ``test_accelerator.py`` in a separate process."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import waits
from gpu_step import MASK, Step, count
from quickstart_runs import VERIFIER, Workshop
from simulated_device import DEVICE, install, simulated
from small_models import CONFIGS, random_draft, random_model
from step_counts import Counting
from training_runs import scalars, weights

from specforge.__main__ import main

install()

UNUSED = "--model.draft.mask_token_id=3"  # no text of the quickstart holds it
FIT: dict[str, tuple[dict[str, Any], list[str]]] = {
    "eagle3": ({}, []),
    "eagle3, other settings": (
        {},
        [
            '--model.objective={"lk_lambda": 1.0, "kl": 0.5}',
            "--model.activation_checkpointing=true",
            "--model.optimizer.name=muon",
            "--model.draft.num_layers=2",
            "--data.features=record",
        ],
    ),
    "hass": (
        {"algorithm": "eagle", "model": {"noise": 0.0, "alignment_steps": 3}},
        ['--model.objective={"cross_entropy": 0.1, "top_k": 1.0}'],
    ),
    "mlp": (
        {"algorithm": "mlp", "model": {"draft": {"num_layers": 2, "intermediate_size": 64}}},
        ["--model.stage_two.begin=0.5", "--model.stage_two.new_tokens=4", "--model.stage_two.prompt_length=8"],
    ),
    "dspark": ({"algorithm": "dspark", "model": {"anchors": 4}}, ["--model.draft.num_layers=1", UNUSED]),
    "peagle": (
        {"algorithm": "peagle", "model": {"depths": 3}},
        ["--model.draft.num_layers=1", "--model.draft.draft_vocab_size=200", UNUSED],
    ),
    "draft_model": ({"algorithm": "draft_model", "model": {}}, ["--model.draft.init_layers=[0, 7]"]),
}


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@pytest.fixture
def workshop(tmp_path: Path, cache: Path) -> Workshop:
    made = Workshop(tmp_path, cache)
    made.values["verifier_dtype"] = "float32"  # accelerators use the stored dtype by default
    made.values["trainer"] = {
        **{"max_steps": 2, "max_epochs": 9, "log_every_n_steps": 1},
        **{"val_check_interval": 2, "limit_val_batches": 1},
    }
    return made


def on_both(run: Callable[[str], Any]) -> tuple[Any, Any]:
    """Run on the CPU and on the simulated accelerator."""
    on_cpu = run("cpu")
    with simulated():
        return on_cpu, run(DEVICE.type)


def test_the_two_devices_do_not_mix() -> None:
    with simulated():
        here, there = torch.ones(3), torch.ones(3, device=DEVICE)
        assert (there + there).tolist() == [2, 2, 2] and (there * torch.tensor(2.0)).tolist() == [2, 2, 2]
        assert there[torch.tensor([True, False, True])].device == DEVICE
        for mixing in (
            lambda: here + there,
            lambda: torch.cat([here, there]),
            lambda: here[there.long()],
            lambda: here.add_(there[0]),
            there.numpy,
        ):
            with pytest.raises(RuntimeError):
                mixing()


# EAGLE-3's defaults are trained by the tests of prepared features and of other commands.
@pytest.mark.parametrize("name", [name for name in FIT if name != "eagle3"])
def test_fit_validate_and_resume(name: str, workshop: Workshop) -> None:
    values, options = FIT[name]
    workshop.values |= values

    def run(device: str) -> Path:
        words = [*workshop.words(device, *options), f"--trainer.accelerator={device}", "--model.optimizer.lr=1e-4"]
        if "--data.features=record" in options:
            words.append(f"--data.cache_dir={workshop.folder / device / 'cache'}")
        assert main(["fit", *words]) == 0
        assert main(["fit", *words, "--trainer.max_steps=3", "--ckpt_path=last"]) == 0
        # It logs nothing to compare; it only has to run on the accelerator.
        assert device == "cpu" or main(["validate", *words, "--ckpt_path=last"]) == 0
        return workshop.run_folder(device)

    on_cpu, there = on_both(run)
    for tag in ("train/loss", "val/loss", "val/acceptance_length"):
        expected = scalars(on_cpu, tag)
        assert scalars(there, tag) == [(step, pytest.approx(value, rel=1e-3)) for step, value in expected] and expected
    trained = weights(there / "checkpoints" / "last.ckpt")
    assert not any(weight.device == DEVICE for weight in trained.values())
    for name, expected in weights(on_cpu / "checkpoints" / "last.ckpt").items():
        torch.testing.assert_close(trained[name], expected, rtol=1e-2, atol=1e-2, msg=name)


def test_prepared_features_are_the_same_and_are_trained_on(workshop: Workshop) -> None:
    def run(device: str) -> Path:
        store, words = workshop.folder / f"features-{device}", workshop.words(device)
        assert main(["prepare", "features", *words, "--output", str(store), "--dtype=float32"]) == 0
        words += [f"--trainer.accelerator={device}", f"--data.features={store}"]
        assert main(["fit", *words]) == 0
        return workshop.run_folder(device)

    on_cpu, there = on_both(run)
    expected = scalars(on_cpu, "train/loss")
    assert scalars(there, "train/loss") == [(step, pytest.approx(value, rel=1e-3)) for step, value in expected]


# How often the host may wait for the device in a step that logs nothing to a file, by kind and features.
# Event: the loss, to check that it is finite. Values: the two of the progress bar, once a second. Live, transformers
# checks for packed rows.
WAITS = {"live": {waits.EVENT: 1, waits.VALUES: 1, waits.VALUE: 1}, "stored": {waits.EVENT: 1, waits.VALUES: 1}}


@pytest.mark.parametrize(
    ("name", "features"),
    [
        *(("eagle3", features) for features in WAITS),
        *((name, "live") for name in ("hass", "dspark", "peagle", "draft_model")),
    ],
)
def test_a_training_step_hardly_waits_for_the_device(name: str, features: str, workshop: Workshop) -> None:
    workshop.values |= FIT[name][0]
    counted = {"class_path": "waits.CountedStep", "init_args": {"step": 3}}
    workshop.values["trainer"] |= {"max_steps": 3, "log_every_n_steps": 50, "val_check_interval": 8}
    workshop.values["trainer"] |= {"callbacks": [counted], "gradient_clip_val": 1.0}
    words = workshop.words("there", f"--trainer.accelerator={DEVICE.type}", *FIT[name][1])
    with simulated():
        if features == "stored":
            store = str(workshop.folder / "features")
            assert main(["prepare", "features", *workshop.words("there"), "--output", store, "--dtype=float32"]) == 0
            words.append(f"--data.features={store}")
        assert main(["fit", *words]) == 0
    allowed = Counter(WAITS[features])
    if name == "draft_model":
        allowed[waits.VALUE] += 1  # transformers looks for packed rows here, too
    excess = {kind: times for kind, times in waits.by_kind().items() if times > allowed[kind]}
    assert waits.found and not excess, f"a step waits more often than allowed:\n{waits.calls()}"


SMALL = {
    **{"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "vocab_size": 2048, "max_position_embeddings": 2048},
}
# A step in bf16-mixed at small sizes, as counted: kernels, megabytes that they read and write besides products, and
# megabytes of memory.
BUDGETS: dict[tuple[str, str], tuple[dict[str, Any], int, int, int]] = {
    ("eagle3", "stored"): ({"ttt_steps": 3, "draft": {"draft_vocab_size": 512}}, 765, 120, 25),
    ("eagle3", "live"): ({"ttt_steps": 3, "draft": {"draft_vocab_size": 512}}, 1095, 198, 35),
    ("eagle", "stored"): ({}, 381, 65, 17),
    ("hass", "stored"): ({}, 748, 97, 19),
    ("mlp", "stored"): ({}, 223, 98, 28),
    ("peagle", "stored"): (
        {"depths": 3, "draft": {"num_layers": 1, "draft_vocab_size": 512, "mask_token_id": MASK}},
        577,
        133,
        33,
    ),
    ("dflash", "stored"): ({"draft": {"num_layers": 1, "mask_token_id": MASK}}, 426, 150, 23),
    ("dflash2", "stored"): ({"draft": {"num_layers": 1, "mask_token_id": MASK}}, 745, 454, 56),
    ("dspark", "stored"): ({"draft": {"num_layers": 1, "mask_token_id": MASK}}, 502, 214, 45),
    ("mtp", "stored"): ({}, 798, 106, 20),
    ("draft_model", "stored"): ({"draft": {"init_layers": [0, 7]}}, 463, 188, 50),
}


@pytest.mark.parametrize(("name", "features"), BUDGETS)
def test_a_step_stays_within_its_budget(name: str, features: str) -> None:
    settings, kernels, moved, held = BUDGETS[name, features]
    counts = count(Step(name, features == "stored", 0.3, 256, 64, SMALL, settings))
    assert 0 < counts.kernels.total() <= 1.05 * kernels
    assert 0 < counts.bytes.total() / 1e6 <= 1.05 * moved
    assert 0 < counts.peak / 1e6 <= 1.05 * held
    # The loss, the figures of the progress bar, and transformers' search for packed rows.
    assert counts.waits.total() <= 3, counts.waits


@pytest.mark.parametrize(
    ("proposal", "size"), [(None, None), ("dynamic_tree:depth=3", 12), ("sampling", 12), ("dynamic_tree:depth=3", None)]
)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_texts_are_the_same(family: str, size: int | None, proposal: str | None) -> None:
    prompts = torch.randint(1, 31, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]])
    sampled = {"temperature": 1.0, "verification": "block", "seed": 4} if proposal == "sampling" else {}

    def run(device: str) -> list[list[int]]:
        verifier = random_model(CONFIGS[family](), seed=3, scale=0.5).to(device)
        draft = random_draft(verifier, size=size).to(device)
        draft.attach_verifier(verifier)
        ids = (prompts * mask).to(device)
        return draft.generate(ids, mask.to(device), max_new_tokens=12, proposal=proposal, **sampled).tolist()

    on_cpu, there = on_both(run)
    assert there == on_cpu


def test_other_commands(workshop: Workshop, capfd: pytest.CaptureFixture[str]) -> None:
    prompts = workshop.folder / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "How many apples?"}) + "\n")
    verifier = ["--verifier", str(VERIFIER), "--verifier_dtype=float32"]

    def run(device: str) -> list[Any]:
        folder, run = workshop.folder / device, workshop.run_folder(device)
        for words in (
            ["fit", *workshop.words(device), f"--trainer.accelerator={device}"],
            ["evaluate", str(run / "draft"), "--prompts", str(prompts), f"--output={folder}/evaluation", *verifier],
            ["prepare", "responses", str(prompts), f"--output={folder}/responses", *verifier],
            ["export", str(run), "--format=vllm", "--prompts", str(prompts), f"--output={folder}/vllm", *verifier],
            ["verify", f"{folder}/vllm", *verifier],
            ["doctor"],
        ):
            capfd.readouterr()
            length = ["--max_new_tokens=4"] if words[0] in ("evaluate", "prepare") else []
            assert main([*words, *length]) == 0
        assert (DEVICE.type in capfd.readouterr().out) == (device == DEVICE.type)
        found = json.loads((folder / "evaluation" / "results.json").read_text())
        return [
            (folder / "responses" / "responses.jsonl").read_text(),
            [contender["sets"][0]["num_accepted_tokens"] for contender in found["contenders"]],
        ]

    on_cpu, there = on_both(run)
    assert there == on_cpu


def test_compiled_operations_between_products_read_and_write_once() -> None:
    counting = Counting(compiled=("layer",))
    with simulated(shapes_only=True):
        state, weight = torch.empty(64, 32, device=DEVICE), torch.empty(32, 32, device=DEVICE)
        gradients = torch.empty(32, 32, device=DEVICE)
        counting.start(weights=[weight])
        counting.enter("layer")
        kept = state * 2 + 1  # its product is not kept
        product = (kept * state) @ weight
        gradients += weight
        counting.leave()
        counting.stop()
    assert product.shape == (64, 32)
    size = 64 * 32 * 4
    # Read: the state. Written: what is kept, and what the product reads. The weights are added outside.
    assert counting.counts.bytes_by_operation == {
        ("layer", "fused"): 3 * size,
        ("layer", "mm"): 0,
        ("layer", "add_"): 3 * 32 * 32 * 4,
    }
    assert counting.counts.kernels_by_operation["layer", "fused"] == 1


def test_compiled_calls_convert_the_weights_themselves() -> None:
    counting = Counting(compiled=("layer",))
    with simulated(shapes_only=True):
        state, weight = torch.empty(64, 32, device=DEVICE), torch.empty(16, 32, device=DEVICE)
        counting.start(weights=[weight])
        counting.enter("layer")
        converted, read = weight.bfloat16(), state.bfloat16()
        for _ in range(3):
            read @ converted.T
        counting.leave()
        counting.stop()
    # float32 is read, and bfloat16 written.
    assert counting.counts.bytes_by_operation["layer", "mm"] == 3 * 16 * 32 * (4 + 2)
    assert counting.counts.bytes_by_operation["layer", "_to_copy"] == 0
