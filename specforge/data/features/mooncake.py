"""States through a Mooncake store: in the memory of the servers, read over TCP or RDMA, without a shared folder.

The connector of hs-connectors puts the states of a request into the store as one object. The response holds the
object's name and the layout of its bytes, which hs-connectors' reader takes. Where the store is, Mooncake's own
environment says.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import TYPE_CHECKING, Any

from torch import Tensor

from specforge.data.features.served import ServedStates, WrongStates, as_states
from specforge.data.features.transports import pauses
from specforge.engines.connection import on_one_line
from specforge.errors import SpecforgeError, UsageError
from specforge.quiet import native_messages_hidden

if TYPE_CHECKING:
    from mooncake.mooncake_config import MooncakeConfig

    from specforge.private.hs_connectors import StatesStore

# Nothing says whether a server still writes; it begins before its response arrives.
WRITTEN_SECONDS = 60.0
# Each keeps a buffer of the longest row's size.
_READERS = 4
_INSTALL = "pip install 'specforge-lightning[mooncake]'"
_LIBRARIES = "on Debian and Ubuntu, apt-get install libibverbs1 libnuma1 libcurl4"


class MooncakeTransport:
    """Objects in a Mooncake store; each process that receives states opens a client of its own.

    Raises:
        UsageError: The extra is not installed, or Mooncake's configuration is missing or invalid.
    """

    # Mooncake starts threads as soon as it is imported, and locks up in processes that are forked later.
    survives_fork = False

    def __init__(self) -> None:
        self._settings = _settings()
        self._readers = ThreadPoolExecutor(_READERS, "mooncake")
        self._opening = Lock()
        self._opened: StatesStore | None = None

    def connector(self, folder: str | None) -> dict[str, Any]:
        """Return the settings of hs-connectors' connector: those of this process for Mooncake."""
        if folder is not None:
            raise UsageError("--folder: the transport mooncake uses none; omit it")
        found = self._settings
        store = {
            "local_hostname": found.local_hostname,
            "metadata_server": found.metadata_server,
            "master_server_address": found.master_server_address,
            "global_segment_size": found.global_segment_size,
            "local_buffer_size": found.local_buffer_size,
            "protocol": found.protocol,
            "device_name": found.device_name or "",
        }
        return {
            "kv_connector": "MooncakeHiddenStatesConnector",
            "kv_role": "kv_producer",
            "kv_connector_module_path": "hs_connectors.mooncake_hidden_states_connector",
            "kv_connector_extra_config": {"mooncake": store},
        }

    async def receive(self, parameters: Mapping[str, Any]) -> ServedStates:
        """Wait until the object is written, and read it.

        Raises:
            SpecforgeError: The store cannot be reached.
        """
        name = _name(parameters)
        loop = asyncio.get_running_loop()
        async for waited in pauses():
            tensors = await loop.run_in_executor(self._readers, self._read, dict(parameters))
            if tensors is not None:
                return as_states(tensors, f"Mooncake's object {name}")
            if waited > WRITTEN_SECONDS:
                break
        raise WrongStates(
            f"the server has not put {name} into Mooncake's store within {WRITTEN_SECONDS:g} seconds, or it was "
            "evicted; servers and clients need the same MOONCAKE_MASTER, and the store room for all rows in flight"
        )

    def delete(self, parameters: Mapping[str, Any]) -> None:
        """Delete the object, and the server's report of an error."""
        try:
            self._store.delete_sample(_name(parameters))
        except RuntimeError as error:
            raise self._failed(error) from error

    def sweep(self, tag: str) -> None:
        """Delete the objects of these requests, if written."""
        try:
            self._store.delete_matching(f".*{tag}-.*")
        except RuntimeError as error:
            raise self._failed(error) from error

    @property
    def _store(self) -> StatesStore:
        with self._opening:
            if self._opened is None:
                self._opened = _open(self._settings)
            return self._opened

    def _read(self, parameters: dict[str, Any]) -> dict[str, Tensor] | None:
        """Return the tensors of an object; None if it is not there yet."""
        from hs_connectors.mooncake_store import MooncakeIntegrityError

        store = self._store
        try:
            found: dict[str, Tensor] = store.get_sample(parameters, timeout=0.0)
            return found
        except TimeoutError:
            return None
        except MooncakeIntegrityError as error:
            raise WrongStates(on_one_line(error)) from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise WrongStates(f"the response describes no states that hs-connectors can read: {error!r}") from error
        except RuntimeError as error:
            raise self._failed(error) from error

    def _failed(self, error: RuntimeError) -> SpecforgeError:
        where = self._settings.master_server_address
        return SpecforgeError(f"{on_one_line(error)}; is mooncake_master still running at {where}?")


def _settings() -> MooncakeConfig:
    """Return Mooncake's own configuration: the file that MOONCAKE_CONFIG_PATH names, or else MOONCAKE_MASTER etc."""
    try:
        import hs_connectors.mooncake_store  # noqa: F401
        from mooncake.mooncake_config import MooncakeConfig
    except ImportError as error:
        raise UsageError(f"the transport mooncake is not installed ({error}): {_INSTALL}") from error
    try:
        return MooncakeConfig.load_from_env()
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(
            f"Mooncake is not configured: {on_one_line(error).rstrip('.')}; set MOONCAKE_MASTER=HOST:PORT, the "
            "address of mooncake_master, or MOONCAKE_CONFIG_PATH=FILE.json"
        ) from error


def _open(settings: MooncakeConfig) -> StatesStore:
    """Connect to the store, as a client that lends it no memory: states there would be lost when this process ends."""
    # By default it tries for a minute and a half.
    os.environ.setdefault("MC_STORE_CLIENT_SETUP_RETRIES", "1")
    try:
        from mooncake.store import MooncakeDistributedStore
    except ImportError as error:
        raise SpecforgeError(f"Mooncake cannot be loaded: {error}; {_LIBRARIES}") from error
    from specforge.private.hs_connectors import StatesStore

    found, client = settings, MooncakeDistributedStore()
    # It reports errors even if there are none.
    with native_messages_hidden():
        status = client.setup(
            found.local_hostname,
            found.metadata_server,
            0,  # size of its segment
            0,  # and of a buffer, which reading into memory of one's own does not use
            found.protocol,
            found.device_name or "",
            found.master_server_address,
        )
    if status:
        raise SpecforgeError(
            f"no connection to Mooncake's master at {found.master_server_address} over {found.protocol} (status "
            f"{status}); start mooncake_master, or set MOONCAKE_MASTER to its address"
        )
    return StatesStore(client)


def _name(parameters: Mapping[str, Any]) -> str:
    name = parameters.get("handle")
    if not isinstance(name, str):
        raise WrongStates(
            f"the server names no object of Mooncake (kv_transfer_params: {sorted(parameters)}); start it with the "
            "command line that specforge serve-verifier --print prints, or choose the server's transport"
        )
    return name
