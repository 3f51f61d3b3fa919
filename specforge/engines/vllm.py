"""The command line of a vLLM server that extracts hidden states (vLLM 0.18 and later)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ExtractionServer:
    """A server that extracts states.

    Attributes:
        model: Folder or hub id of the verifier.
        layers: vLLM's ids of the layers, ascending.
        connector: Value of ``--kv-transfer-config``: how the states leave it.
        max_length: Longest row in tokens.
        port: Port to listen on.
        tensor_parallel: Number of devices that share each layer.
        dtype: Type of the weights; None for the stored one.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether to run code from the verifier's repository.
    """

    model: str
    layers: Sequence[int]
    connector: dict[str, Any]
    max_length: int
    port: int = 8000
    tensor_parallel: int = 1
    dtype: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    def words(self) -> list[list[str]]:
        """Return the words of the command line, by flag."""
        speculation = {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": list(self.layers)}},
        }
        words = [["vllm", "serve", self.model], ["--port", str(self.port)]]
        if self.revision is not None:
            words.append(["--revision", self.revision])
        if self.trust_remote_code:
            words.append(["--trust-remote-code"])
        if self.dtype is not None:
            words.append(["--dtype", self.dtype])
        return [
            *words,
            ["--tensor-parallel-size", str(self.tensor_parallel)],
            # A request asks for one token after its row.
            ["--max-model-len", str(self.max_length + 1)],
            # Of cached tokens no states are computed.
            ["--no-enable-prefix-caching"],
            ["--speculative-config", json.dumps(speculation, separators=(",", ":"))],
            ["--kv-transfer-config", json.dumps(self.connector, separators=(",", ":"))],
        ]
