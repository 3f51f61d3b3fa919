"""A Mooncake store on loopback, and a server that puts states into it as hs-connectors' connector does.

The connector itself imports vLLM. Its half of the work here is its own: the layout of an object and the writing of it.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from extracting_server import ExtractingServer, Write, Written
from hs_connectors.mooncake_store import VERSION, MooncakeHiddenStatesStore, MooncakeStoreConfig, packed_layout
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@contextmanager
def mooncake_master(folder: Path) -> Iterator[str]:
    """Run ``mooncake_master``; yield its address."""
    rpc, metrics = _free_port(), _free_port()
    words = ["-rpc_address=127.0.0.1", f"-rpc_port={rpc}", "-metrics_host=127.0.0.1", f"-metrics_port={metrics}"]
    with (folder / "master.log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "mooncake.cli", *words], stdout=log, stderr=log)
    try:
        _await_port(rpc)
        yield f"127.0.0.1:{rpc}"
    finally:
        process.kill()
        process.wait()


class MooncakeServer(ExtractingServer):
    """The server.

    Args:
        model: The verifier.
        layers: ``eagle_aux_hidden_state_layer_ids``.
        settings: The connector's ``mooncake`` settings.
        tokenizer: Renders chats; None if the server has none.

    Attributes:
        names: Names of the objects, in order.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[int],
        settings: dict[str, Any],
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__(model, layers, Path(), tokenizer)
        self.names: list[str] = []
        self.store = MooncakeHiddenStatesStore(MooncakeStoreConfig.from_dict(settings)).setup()

    def begin_writing(self, name: str, tensors: Written) -> tuple[dict[str, Any], Write]:
        """Return the manifest of an object, and what puts it into the store or, for None, the report of an error."""
        handle = re.sub(r"[^a-zA-Z0-9_-]", "_", name)
        layout, size = packed_layout({key: (tuple(one.shape), one.dtype) for key, one in tensors.items()})
        metadata = {"num_tokens": len(tensors["token_ids"]), "total_aligned_bytes": size, "extract_mode": "all"}
        manifest = {"handle": handle, "version": VERSION, "tensors": layout, "metadata": metadata}
        self.names.append(handle)

        def write(changed: Written | None) -> None:
            if changed is None:
                self.store.put_error(manifest, "Non-finite producer tensor 'hidden_states'")
            else:
                self.store.put_sample(manifest, changed)

        return json.loads(json.dumps(manifest)), write

    def left(self) -> list[str]:
        """Return the names of the objects that are still in the store."""
        names = [name for one in self.names for name in (one, f"{one}:error")]
        return [name for name in names if self.store._store.is_exist(name)]


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _await_port(port: int) -> None:
    end = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            assert time.monotonic() < end, "mooncake_master does not start"
            time.sleep(0.05)
