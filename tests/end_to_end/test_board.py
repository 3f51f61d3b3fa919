"""A run's TensorBoard files, read back."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from quickstart_runs import TTT_STEPS, VERIFIER, rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.metadata import EXPERIMENT_TAG, SESSION_END_INFO_TAG, SESSION_START_INFO_TAG
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from training_runs import scalars
from transformers import AutoTokenizer

from specforge import SpeculatorModel
from specforge.__main__ import main
from specforge.decoding.recorded import replay_text
from specforge.proposals import GreedyTokenProposalConfig
from specforge.proposals.greedy import GreedyProposer
from specforge.sampling import RandomSource, Sampling
from specforge.training.callbacks.board.acceptance import MOST_CURVES, draw_acceptance
from specforge.training.callbacks.board.samples import PROMPT_TOKENS, SAMPLES, Sample, to_markdown
from specforge.verifier.features import capture

PAGE = Path(__file__).parents[2] / "docs" / "tensorboard.md"
THREE_VALIDATIONS = ["--trainer.max_steps=12", "--trainer.val_check_interval=4"]


@pytest.fixture(scope="module")
def run(shared) -> Path:
    """The folder of a run with a validation after 4, 8 and 12 steps."""
    assert main(["fit", *shared.words("runs", *THREE_VALIDATIONS)]) == 0
    return shared.run_folder("runs")


def events_of(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run), size_guidance={"images": 0, "tensors": 0}).Reload()


@pytest.fixture(scope="module")
def events(run) -> EventAccumulator:
    return events_of(run)


def texts(events: EventAccumulator, tag: str) -> dict[int, str]:
    """Return the texts of a tag by step."""
    found = events.Tensors(f"{tag}/text_summary")
    return {event.step: event.tensor_proto.string_val[0].decode() for event in found}


class TestLayout:
    @pytest.fixture(scope="class")
    def layout(self, events) -> Layout:
        (event,) = events.Tensors("custom_scalars__config__")
        return Layout.FromString(event.tensor_proto.string_val[0])

    def test_groups(self, layout):
        groups = ["Acceptance length", "Acceptance by position", "Losses", "Speed and memory", "Learning rate"]
        assert [category.title for category in layout.category] == groups

    def test_no_chart_is_empty_and_every_curve_of_the_draft_is_in_a_chart(self, layout, events):
        tags = set(events.Tags()["scalars"])
        shown = set()
        for chart in (chart for group in layout.category for chart in group.chart):
            found = {tag for tag in tags if any(re.match(pattern, tag) for pattern in chart.multiline.tag)}
            assert found, chart.title
            shown |= found
        agreement = {tag for tag in tags if "/agreement/" in tag}
        results = {tag for tag in tags if tag.startswith(("best/", "final/"))}
        assert tags - shown == agreement | results | {"epoch"}


class TestFigure:
    def test_one_more_curve_at_each_validation(self, events):
        images = events.Images("val/acceptance_by_position")
        assert [image.step for image in images] == [4, 8, 12]
        pictures = [Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB") for image in images]
        colors = [
            len({pixel for _, pixel in picture.getcolors(2**20) if max(pixel) - min(pixel) > 60})
            for picture in pictures
        ]
        assert 0 < colors[0] < colors[1] < colors[2]

    def test_of_many_curves_some_are_drawn(self):
        curves = [(step, [0.5, step / 1000], [0.5, step / 500]) for step in range(1, 301)]
        few = [curves[at] for at in range(299, -1, -38)][::-1]
        assert len(few) == MOST_CURVES and few[-1] == curves[-1]
        assert (draw_acceptance(curves) == draw_acceptance(few)).all()

    def test_nothing_is_cut_and_each_position_has_a_color(self):
        positions = 15
        rates = [0.95**position for position in range(1, positions + 1)]
        picture = draw_acceptance([(step, rates, rates) for step in range(1_000_000, 9_000_000, 1_000_000)])
        edges = [picture[0], picture[-1], picture[:, 0], picture[:, -1]]
        assert all((edge == 255).all() for edge in edges)
        over_run = Image.fromarray(picture).crop((0, len(picture) * 2 // 3, picture.shape[1], len(picture)))
        many = [color for number, color in over_run.getcolors(2**20) if number > 40 and max(color) - min(color) > 60]
        assert len(many) == positions

    def test_a_resumed_run_keeps_its_curves(self, workshop, fit):
        fit("runs", "--trainer.max_steps=8", "--trainer.val_check_interval=4")
        run = fit("runs", *THREE_VALIDATIONS, "--ckpt_path=last")
        saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]["AcceptanceFigure"]
        assert [steps for steps, *_ in saved["curves"]] == [4, 8, 12]
        for at, kind in ((1, "pos"), (2, "cond")):
            expected = [
                [value for _, value in scalars(run, f"val/accept_rate_{kind}_{k + 1}")] for k in range(TTT_STEPS)
            ]
            for curve, *rates in zip(saved["curves"], *expected, strict=True):
                assert curve[at] == pytest.approx(rates)


ONE_VALIDATION = ["--trainer.val_check_interval=12", "--trainer.check_val_every_n_epoch=null"]
MODELS: dict[str, dict[str, Any]] = {
    "eagle3": {"ttt_steps": TTT_STEPS, "draft": {"draft_vocab_size": 256}},
    "mlp": {"draft": {"num_layers": 2, "intermediate_size": 48}},
}


class TestSamples:
    @pytest.mark.parametrize("algorithm", MODELS)
    def test_show_the_rounds_that_the_draft_takes_through_the_text(self, workshop, fit, algorithm):
        """Each text is decoded again with the written draft, and must be marked in the same way."""
        model = {**MODELS[algorithm], "optimizer": {"name": "muon", "lr": 2e-2}}
        workshop.values |= {"algorithm": algorithm, "model": model}
        run = fit("runs", "--trainer.max_steps=12", "--callbacks.samples.texts=3", *ONE_VALIDATION)
        draft = SpeculatorModel.from_pretrained(run / "draft", verifier=str(VERIFIER))
        steps = sum(tag.startswith("val/accept_rate_pos_") for tag in events_of(run).Tags()["scalars"])
        proposer = GreedyProposer(GreedyTokenProposalConfig(speculative_tokens=steps), Sampling(), RandomSource())
        tokenizer = AutoTokenizer.from_pretrained(VERIFIER)
        expected = []
        for row in rows("validation.jsonl", 8):
            text, begin = torch.tensor(row["input_ids"]), row["loss_mask"].index(1)
            with torch.no_grad():
                features = capture(draft.verifier, text[None], torch.arange(len(text))[None], draft.aux_layers)
                rounds = replay_text(proposer, draft.drafter(1), text, features, begin)
            prompt = row["input_ids"][max(0, begin - PROMPT_TOKENS) : begin]
            accepted = [number for _, number in rounds]
            expected.append(to_markdown(Sample(prompt, row["input_ids"][begin:], accepted, steps), tokenizer))
        found = [texts(events_of(run), f"val/sample_{number}") for number in range(3)]
        assert all(list(texts_of_step) == [12] and texts_of_step[12] in expected for texts_of_step in found)
        assert found[0] != found[1]
        assert "<strong>" in "".join(expected)  # otherwise the draft has learnt nothing and the test is void

    def test_are_the_same_texts_at_each_validation(self, events):
        for number in range(SAMPLES):
            shown = texts(events, f"val/sample_{number}")
            assert list(shown) == [4, 8, 12]
            bodies = {re.sub("</?strong>", "", text.partition("\n\n")[2]) for text in shown.values()}
            assert len(bodies) == 1

    def test_token_rows_without_a_tokenizer_have_no_samples(self, workshop, fit, monkeypatch):
        def missing(*words: Any, **options: Any) -> None:
            raise OSError("no tokenizer here")

        monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", missing)
        run = fit("runs", "--trainer.max_steps=1", "--trainer.val_check_interval=1")
        assert not [tag for tag in events_of(run).Tags()["tensors"] if "sample" in tag]
        assert scalars(run, "val/acceptance_length")


class TestHyperparameters:
    @staticmethod
    def content(events: EventAccumulator, tag: str) -> HParamsPluginData:
        return HParamsPluginData.FromString(events.summary_metadata[tag].plugin_data.content)

    def test_settings(self, events):
        stored = self.content(events, SESSION_START_INFO_TAG).session_start_info.hparams
        assert stored["model.optimizer.lr"].number_value == 4e-3
        assert stored["model.objective"].string_value == "kl 1"
        assert stored["data.packing"].string_value == "true"
        assert stored["trainer.gradient_clip_val"].string_value == "null"
        assert not {"output_dir", "trainer.logger", "ckpt_path", "data.cache_dir"} & set(stored)

    def test_columns_are_left_to_tensorboard(self, events):
        assert EXPERIMENT_TAG not in events.summary_metadata
        assert sorted(events.Tags()["scalars"])[:5] == [
            *(f"best/{name}" for name in ("acceptance_length", "loss")),
            "epoch",
            *(f"final/{name}" for name in ("acceptance_length", "loss")),
        ]

    def test_results_of_a_finished_run(self, run, events):
        lengths, losses = scalars(run, "val/acceptance_length"), dict(scalars(run, "val/loss"))
        step, best = max(lengths, key=lambda step_and_value: step_and_value[1])
        assert scalars(run, "best/acceptance_length")[-1] == (step + 1, best)
        assert scalars(run, "best/loss")[-1] == (step + 1, losses[step])
        assert scalars(run, "final/acceptance_length") == [(12, lengths[-1][1])]
        assert scalars(run, "final/loss") == [(12, losses[11])]
        assert SESSION_END_INFO_TAG in events.summary_metadata

    def test_results_of_a_run_that_was_stopped(self, workshop, fit, interrupt_at):
        interrupt_at(6)
        with pytest.raises(SystemExit):
            main(["fit", *workshop.words("runs", *THREE_VALIDATIONS)])
        run = workshop.run_folder("runs")
        assert scalars(run, "final/acceptance_length") == [(6, scalars(run, "val/acceptance_length")[-1][1])]
        assert SESSION_START_INFO_TAG in events_of(run).summary_metadata
        assert SESSION_END_INFO_TAG not in events_of(run).summary_metadata

    def test_a_run_without_validation_has_only_settings(self, workshop, fit):
        run = fit("runs", "--data.validation=null", "--data.validation_share=0", "--trainer.max_steps=2")
        assert SESSION_START_INFO_TAG in events_of(run).summary_metadata
        assert not [tag for tag in events_of(run).Tags()["scalars"] if tag.startswith(("best/", "final/"))]


def test_the_page_lists_exactly_the_logged_tags(events):
    table = PAGE.read_text().partition("## All tags")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    described = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    patterns = {name: re.escape(name) for name in described}
    for placeholder, values in (("<k>", r"\d+"), ("<K>", r"\d+"), ("<objective>", "kl"), (r"\*", "(train|val)")):
        patterns = {name: pattern.replace(placeholder, values) for name, pattern in patterns.items()}
    tags = {tag for kind in ("scalars", "images") for tag in events.Tags()[kind]}
    tags |= {tag.removesuffix("/text_summary") for tag in events.Tags()["tensors"] if tag.endswith("/text_summary")}
    assert not {tag for tag in tags if not any(re.fullmatch(expression, tag) for expression in patterns.values())}
    assert not {name for name, expression in patterns.items() if not any(re.fullmatch(expression, tag) for tag in tags)}
