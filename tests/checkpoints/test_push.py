"""Uploading an export, against a stand-in of the hub."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from stand_ins import Hub, serving

from specforge.__main__ import main


def push(address: str, draft: Path, output: Path) -> subprocess.CompletedProcess[str]:
    """Export and upload in a separate process without the tests' offline settings."""
    words = ["export", str(draft), "--format", "vllm", "--output", str(output), "--skip_verifier"]
    command = [sys.executable, "-m", "specforge", *words, "--push_to_hub", "owner/name"]
    environment = {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_none",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_all_files_arrive(draft_of: Callable[..., Path], tmp_path: Path) -> None:
    hub = Hub()
    with serving(hub.answer) as address:
        done = push(address, draft_of("eagle"), tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert f"{address}/owner/name" in done.stdout
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert len(hub.created) == 1 and hub.created[0]["name"] == "name" and hub.created[0]["organization"] == "owner"
    # The card serves it from the hub.
    assert '"model": "owner/name"' in hub.files["README.md"].decode()


def test_a_failed_upload_keeps_the_export(
    draft_of: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tests run without a network."""
    words = ["export", str(draft_of("eagle")), "--format", "vllm", "--output", str(tmp_path / "out"), "--skip_verifier"]
    assert main([*words, "--push_to_hub", "owner/name"]) == 1
    assert "is written, but cannot be uploaded to owner/name" in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").is_file()
