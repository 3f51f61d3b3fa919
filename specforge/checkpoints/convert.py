"""Conversion of a published draft into specforge's own layout, for training, measuring and exporting."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from specforge.checkpoints.formats import read_draft
from specforge.checkpoints.writing import replacing_folder
from specforge.config import VerifierConfig
from specforge.decoding.checks import check_fit
from specforge.models.speculator import SpeculatorModel
from specforge.verifier.loading import load_config


@dataclass(frozen=True)
class Conversion:
    """Result of a conversion.

    Attributes:
        folder: Folder of the converted draft.
        format: The source format, such as ``"A/NAME"`` for an algorithm A.
        model: The draft, detached.
    """

    folder: Path
    format: str
    model: SpeculatorModel


def convert(source: str, verifier: str, output: Path | None = None, format: str | None = None) -> Conversion:
    """Read a draft in any format and write it in specforge's own.

    Args:
        source: Folder or hub id.
        verifier: Folder or hub id of its verifier, stored in the configuration.
        output: Folder to write; None for ``<name>-specforge`` in the working directory.
        format: Name of the source format; None to detect it.

    Raises:
        UsageError: The format is unknown; tensors are missing, unknown, or of the wrong shape; the draft does not fit
            the verifier. Nothing is filled in or dropped.
        SpecforgeError: The result cannot be written.
    """
    name = str(Path(verifier).absolute()) if Path(verifier).is_dir() else verifier
    config = load_config(name)
    layout, model = read_draft(source, VerifierConfig.from_config(config, name), format)
    check_fit(model, config)
    target = output or Path(f"{Path(source).name}-specforge")
    with replacing_folder(target) as temporary:
        model.save_pretrained(temporary)
    return Conversion(target, f"{layout.format.algorithm}/{layout.format.name}", model)
