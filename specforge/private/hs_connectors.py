"""Private names of hs-connectors."""

from __future__ import annotations

from typing import Any

from hs_connectors.mooncake_store import MooncakeHiddenStatesStore, MooncakeStoreConfig


class StatesStore(MooncakeHiddenStatesStore):
    """hs-connectors' reader and writer of states, with a client that is already set up.

    Its own ``setup`` opens a context on the accelerator in each process, hundreds of megabytes, and it deletes only
    objects whose names are known.

    Args:
        client: A ``MooncakeDistributedStore``.
    """

    def __init__(self, client: Any) -> None:
        super().__init__(MooncakeStoreConfig())
        self._store = client

    def delete_matching(self, pattern: str) -> None:
        """Delete the objects whose whole names match a regular expression.

        Raises:
            RuntimeError: The store cannot be reached.
        """
        if (status := self._store.remove_by_regex(pattern, True)) < 0:
            raise RuntimeError(f"Mooncake remove_by_regex failed for {pattern} with status={status}")
