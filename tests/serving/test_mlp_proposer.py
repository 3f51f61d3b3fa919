"""Error messages of the proposer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import vllm

from specforge.errors import UsageError
from specforge_mlp.vllm import MLPProposer


def settings(**additional: str) -> Any:
    return SimpleNamespace(additional_config=additional)


def test_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.34.0")
    with pytest.raises(RuntimeError, match=r"this is vLLM 0\.34\.0; install vllm==0\.33\.\*"):
        MLPProposer(settings(mlp_speculator="draft"))


def test_no_draft() -> None:
    with pytest.raises(UsageError, match=r'name the draft: --additional-config .*"mlp_speculator": "FOLDER"'):
        MLPProposer(settings())
