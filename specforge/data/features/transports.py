"""How states come from a serving engine to this process: the interface of transports, and that of files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

from specforge.data.features.served import ServedStates, WrongStates, is_being_written, lock_of, read_states
from specforge.errors import SpecforgeError
from specforge.hookspecs import FeatureTransport
from specforge.registry import installed

FOLDER = "/dev/shm/specforge"  # in memory
VISIBLE_SECONDS = 5.0  # a network file system shows new files after a while
_POLL_SECONDS = (0.002, 0.05)


class Transport(Protocol):
    """Receives states that an engine has computed; one object serves many requests at the same time.

    Attributes:
        survives_fork: Whether a process that has received states may fork others that receive states.
    """

    survives_fork: bool

    def connector(self, folder: str | None) -> dict[str, Any]:
        """Return vLLM's ``--kv-transfer-config`` of a server that sends states this way.

        Args:
            folder: The folder that server and clients share; None for the default.

        Raises:
            UsageError: It uses no folder, and one is given.
        """

    async def receive(self, parameters: Mapping[str, Any]) -> ServedStates:
        """Wait for the states of a request and return them.

        Args:
            parameters: The ``kv_transfer_params`` of the engine's response.

        Raises:
            WrongStates: They cannot be had; the engine is asked again.
        """

    def delete(self, parameters: Mapping[str, Any]) -> None:
        """Delete the states of a request where the engine has put them, if they are still there.

        Raises:
            SpecforgeError: They cannot be deleted.
        """

    def sweep(self, tag: str) -> None:
        """Delete what requests have left whose answers are lost, as far as it can be found.

        Args:
            tag: Begins the ids of these requests, as ``TAG-...``; none of them is still waited for.

        Raises:
            SpecforgeError: It cannot be deleted.
        """


def transport_named(name: str) -> Transport:
    """Return a new transport.

    Raises:
        UsageError: No installed plugin provides it.
    """
    descriptor = installed().find(FeatureTransport, name)
    transport: Transport = installed().load(descriptor, "transport")()
    return transport


async def pauses() -> AsyncIterator[float]:
    """Yield the seconds waited so far, with ever longer pauses between them."""
    begin, (delay, longest) = monotonic(), _POLL_SECONDS
    while True:
        yield monotonic() - begin
        await asyncio.sleep(delay)
        delay = min(2 * delay, longest)


class FileTransport:
    """Files in a folder that the server shares with this machine; a folder in memory (tmpfs) is fastest."""

    survives_fork = True

    def __init__(self) -> None:
        self._folders: set[Path] = set()  # where servers have put files

    def connector(self, folder: str | None) -> dict[str, Any]:
        """Return the settings of vLLM's own connector."""
        return {
            "kv_connector": "ExampleHiddenStatesConnector",
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"shared_storage_path": folder or FOLDER, "use_synchronization_lock": True},
        }

    async def receive(self, parameters: Mapping[str, Any]) -> ServedStates:
        """Wait until the file is written, and read it."""
        path = self._path(parameters)
        await self._written(path)
        return await asyncio.to_thread(read_states, path)

    def delete(self, parameters: Mapping[str, Any]) -> None:
        """Delete the file and its lock."""
        _delete(self._path(parameters))

    def sweep(self, tag: str) -> None:
        """Delete the files and locks of these requests in all folders that states have come from, if written."""
        for folder in self._folders:
            for found in folder.glob(f"*{tag}-*.safetensors*"):
                path = found.with_name(found.name.removesuffix(".lock"))
                if not is_being_written(path):
                    _delete(path)

    async def _written(self, path: Path) -> None:
        async for waited in pauses():
            if not is_being_written(path):
                if path.exists():
                    return
                if lock_of(path).exists():
                    raise WrongStates(f"the server has ended without writing {path}")
                if waited > VISIBLE_SECONDS:
                    raise WrongStates(
                        f"{path} is not on this machine; mount the server's shared_storage_path here, at the same path"
                    )

    def _path(self, parameters: Mapping[str, Any]) -> Path:
        path = parameters.get("hidden_states_path")
        if not isinstance(path, str):
            raise WrongStates(
                f"the server names no file of states (kv_transfer_params: {sorted(parameters)}); start it with the "
                "command line that specforge serve-verifier --print prints, or choose the server's transport"
            )
        self._folders.add(Path(path).parent)
        return Path(path)


class OneByteFileTransport(FileTransport):
    """Files with one byte per value and a scale per token, which hs-connectors' connector writes in half the space."""

    def connector(self, folder: str | None) -> dict[str, Any]:
        """Return the settings of hs-connectors' connector, a subclass of vLLM's."""
        return {
            **super().connector(folder),
            "kv_connector": "FP8HiddenStatesConnector",
            "kv_connector_module_path": "hs_connectors.fp8_hidden_states_connector",
        }


def _delete(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
        lock_of(path).unlink(missing_ok=True)
    except OSError as error:
        raise SpecforgeError(
            f"cannot delete {path}: {error.strerror}; the server's folder must be writable for this user"
        ) from error
