"""The private names of hs-connectors work as assumed; the extra mooncake installs it."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

pytest.importorskip("hs_connectors", reason="needs the extra mooncake")

from hs_connectors import mooncake_store
from hs_connectors.mooncake_store import VERSION, packed_layout

from specforge.private.hs_connectors import StatesStore


class Client:
    """A store in a dictionary, with the methods of Mooncake's client that hs-connectors calls."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def register_buffer(self, address: int, size: int) -> int:
        return 0

    def put_from(self, key: str, address: int, size: int) -> int:
        self.objects[key] = ctypes.string_at(address, size)
        return 0

    def is_exist(self, key: str) -> int:
        return int(key in self.objects)

    def get_size(self, key: str) -> int:
        return len(self.objects[key])

    def get_into(self, key: str, address: int, size: int) -> int:
        ctypes.memmove(address, self.objects[key], size)
        return size

    def remove(self, key: str, force: bool) -> int:
        return 0 if self.objects.pop(key, None) is not None else -704

    def remove_by_regex(self, pattern: str, force: bool) -> int:
        return -900


def test_a_client_that_is_set_up_is_used_without_a_context_on_the_accelerator(monkeypatch):
    monkeypatch.setattr(mooncake_store, "ensure_accelerator_context", lambda: pytest.fail("opens a context"))
    client = Client()
    store = StatesStore(client)
    assert store.is_setup and store.setup() is store
    tensors = {"hidden_states": torch.randn(5, 2, 3), "token_ids": torch.arange(5)}
    layout, size = packed_layout({name: (tuple(one.shape), one.dtype) for name, one in tensors.items()})
    manifest: dict[str, Any] = {"handle": "x", "version": VERSION, "tensors": layout}
    manifest["metadata"] = {"total_aligned_bytes": size}
    store.put_sample(manifest, tensors)
    found = store.get_sample(manifest, timeout=0.0)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    store.delete_sample("x")
    assert not client.objects
    with pytest.raises(TimeoutError):
        store.get_sample(manifest, timeout=0.0)
    with pytest.raises(RuntimeError, match="-900"):
        store.delete_matching(".*")
