"""specforge trains draft models for speculative decoding, measures them, and writes checkpoints that engines load."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from specforge.config import SpeculatorModelConfig, SpeculatorsConfig, TokenProposalConfig, VerifierConfig
    from specforge.models import SpeculatorModel

__version__ = "0.1.0"

_CONFIG = ("SpeculatorModelConfig", "SpeculatorsConfig", "TokenProposalConfig", "VerifierConfig")
__all__ = ["SpeculatorModel", "SpeculatorModelConfig", "SpeculatorsConfig", "TokenProposalConfig", "VerifierConfig"]


def __getattr__(name: str) -> object:
    # Imported on first use, so that the command line starts without loading torch.
    if name in _CONFIG:
        from specforge import config

        return getattr(config, name)
    if name == "SpeculatorModel":
        from specforge.models import SpeculatorModel

        return SpeculatorModel
    raise AttributeError(f"module 'specforge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
