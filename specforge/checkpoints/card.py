"""The model card of an export: training data and settings, the metric, and how to serve it."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from specforge.checkpoints.layout import Layout, StoredDraft
from specforge.checkpoints.run_record import RunRecord
from specforge.checkpoints.verification.probe import Probe

CARD = "README.md"
TEMPLATE = "card.md.jinja"
PACKAGE = "specforge-lightning"


def card(draft: str, stored: StoredDraft, layout: Layout, probe: Probe, record: RunRecord, tokens: int) -> str:
    """Return the text of the card.

    Args:
        draft: Folder or hub id that the export is served from.
        stored: The contents of its files.
        layout: Its format.
        probe: The probe stored with it.
        record: The record of its run.
        tokens: Number of tokens to draft in a round.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # Markdown, not HTML
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    verifier = probe.verifier.name_or_path
    is_local = Path(verifier).is_absolute() or Path(verifier).is_dir()
    return environment.get_template(TEMPLATE).render(
        name=Path(draft).name,
        draft=draft,
        base_model=None if is_local else verifier,
        library=PACKAGE,
        version=version(PACKAGE),
        summary=layout.format.summary,
        probe=probe,
        tokens=tokens,
        parameters=sum(one.numel() for one in stored.tensors.values() if one.is_floating_point()),
        dtype=stored.config.get("dtype"),
        training=_training(record),
        metric=_metric(record),
        serving=layout.serving(draft, verifier, tokens),
    )


def _training(record: RunRecord) -> list[tuple[str, str]]:
    settings = record.settings
    data, model = settings.get("data") or {}, settings.get("model") or {}
    optimizer = model.get("optimizer") or {}
    fields = {
        "trained on": data.get("train"),
        "rows of at most": data.get("max_length") and f"{data['max_length']} tokens",
        "objective": " + ".join(f"{weight} {name}" for name, weight in (model.get("objective") or {}).items()),
        "optimizer": optimizer.get("name") and f"{optimizer['name']}, learning rate {optimizer.get('lr')}",
        "steps": record.step,
    }
    return [(name, str(value)) for name, value in fields.items() if value]


def _metric(record: RunRecord) -> str | None:
    if record.metric is None or record.value is None:
        return None
    return f"{record.metric} {record.value:.3f}, on {(record.settings.get('data') or {}).get('validation')}"
