"""``specforge serve-verifier``: serve the verifier of a configuration with vLLM, which extracts its states."""

from __future__ import annotations

import argparse
import os
import shlex

from specforge.commands.endpoints import add_transport_flag, chosen_transport, port, positive
from specforge.commands.trainer import quieten
from specforge.commands.wrapping import HelpFormatter, wrap_hanging
from specforge.errors import UsageError

DESCRIPTION = """\
Start a vLLM server that extracts the states which a configuration trains on, for prepare features --endpoint. --print
only prints its command line, to run where vLLM and the accelerators are.

  specforge serve-verifier --config FILE --print
  specforge serve-verifier --config FILE --tensor_parallel 8 \\
    --folder /dev/shm/states

All other flags are those of specforge fit: the configuration sets the verifier, the layers, the length of rows, and how
states travel. With the transports file and fp8, the server writes them into --folder, which must have the same path for
the server and for its clients; use one in memory if they share a machine. Several servers may use one folder."""
# Lets a server take rows as long as the verifier's context, and one token more.
LONGER = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"


def run(arguments: list[str]) -> int:
    """Print the command line, or become the server."""
    try:
        found, words = command_line().parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UsageError(f"{error.argument_name}: {error.message}") from None
    from specforge.commands.configured import module_and_data
    from specforge.data.features.served import engine_layer_ids
    from specforge.engines.vllm import ExtractionServer

    quieten()
    module, data = module_and_data(words)
    text, loading = module.teacher.config.get_text_config(), module.teacher.loading
    longest = data.row_settings.max_length
    connector = chosen_transport(found.transport, data).connector(found.folder)
    server = ExtractionServer(
        module.teacher.name,
        engine_layer_ids(sorted({*module.aux_layers, text.num_hidden_layers})),
        connector,
        longest,
        found.port,
        found.tensor_parallel,
        None if loading.dtype == "auto" else loading.dtype,
        loading.revision,
        loading.trust_remote_code,
    )
    context = getattr(text, "max_position_embeddings", None)
    environment = {LONGER: "1"} if context is not None and longest >= context else {}
    if found.print:
        assignments = "".join(f"{name}={value} " for name, value in environment.items())
        print(assignments + " \\\n  ".join(map(shlex.join, server.words())))
        return 0
    line = [word for flag in server.words() for word in flag]
    try:
        os.execvpe(line[0], line, {**os.environ, **environment})
    except FileNotFoundError:
        raise UsageError(
            "vllm is not installed here; install it, or run what --print prints where it is installed"
        ) from None


def command_line() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments, without the settings of ``fit``."""
    parser = argparse.ArgumentParser(
        prog="specforge serve-verifier",
        usage=wrap_hanging("specforge serve-verifier ", "--config FILE [--KEY VALUE ...] [options]", label="usage: "),
        description=DESCRIPTION,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--print", action="store_true", help="Only print the command line.")
    add_transport_flag(parser)
    parser.add_argument(
        "--folder", metavar="FOLDER", help="Folder for the states of answered requests; /dev/shm/specforge by default."
    )
    parser.add_argument("--port", type=port, default=8000, metavar="N", help="Port of the server.")
    parser.add_argument(
        "--tensor_parallel",
        "--tensor-parallel",
        type=positive,
        default=1,
        metavar="N",
        help="Number of devices that share each layer.",
    )
    return parser
