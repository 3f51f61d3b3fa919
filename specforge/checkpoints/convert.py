"""Reading a published draft into the layout that specforge trains on, measures and exports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from specforge.checkpoints.formats import read_draft
from specforge.checkpoints.writing import written_whole
from specforge.config import VerifierConfig
from specforge.decoding.checks import check_fit
from specforge.models.speculator import SpeculatorModel
from specforge.verifier.loading import load_config


@dataclass(frozen=True)
class Conversion:
    """What was converted.

    Attributes:
        folder: Where the draft is now.
        format: The format that it was in, such as ``"A/NAME"`` of an algorithm A.
        model: The draft, detached.
    """

    folder: Path
    format: str
    model: SpeculatorModel


def convert(source: str, verifier: str, output: Path | None = None, format: str | None = None) -> Conversion:
    """Read a draft in any format and write it in specforge's own.

    Args:
        source: Folder or hub id.
        verifier: Folder or hub id of its verifier, noted in the configuration.
        output: Folder to write; ``<name>-specforge`` in the working directory when None.
        format: Name of the format that it is in; None to find out.

    Raises:
        UsageError: It is in no known format; tensors are missing, unknown, or of the wrong shape; the verifier is
            another one. Nothing is made up, and nothing left out.
        SpecforgeError: It cannot be written.
    """
    name = str(Path(verifier).absolute()) if Path(verifier).is_dir() else verifier
    config = load_config(name)
    layout, model = read_draft(source, VerifierConfig.from_config(config, name), format)
    check_fit(model, config)
    target = output or Path(f"{Path(source).name}-specforge")
    with written_whole(target) as beside:
        model.save_pretrained(beside)
    return Conversion(target, f"{layout.format.algorithm}/{layout.format.name}", model)
