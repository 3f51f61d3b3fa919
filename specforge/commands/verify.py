"""``specforge verify``: check that an export is the trained draft and computes what it should."""

from __future__ import annotations

from jsonargparse import ArgumentParser

from specforge.commands.arguments import add_verifier_flags, command_parser, loading_of, parse
from specforge.errors import UsageError
from specforge.imports import without_collection

DESCRIPTION = """\
Check an export. It is read back, checked against the rules of the program that will load it, and compared with the
trained draft: settings, tensors, and the logits of a probe stored in it. With --verifier, the draft also runs with its
verifier; with --endpoint, a running vLLM or SGLang answers the probe's prompts and reports its acceptance.

  specforge verify runs/quickstart/version_0/draft-vllm
  specforge verify EXPORT --verifier MODEL
  specforge verify EXPORT --endpoint http://localhost:8000

Every fault is printed with its likeliest cause; the exit status is 1 if there are any."""


def run(arguments: list[str]) -> int:
    """Check, print the faults, and return 1 if there are any."""
    found = parse(command_line(), arguments)
    with without_collection():
        from specforge.checkpoints.verification.checking import export_faults
        from specforge.checkpoints.verification.probe import Probe

    probe = Probe.load(found.export)
    print(f"{found.export}: {probe.format} format, {probe.algorithm}, for {probe.verifier.name_or_path}")
    faults = export_faults(found.export, found.verifier, loading_of(found))
    checked = ["rules", "settings", "tensors", "logits"]
    if found.verifier is not None:
        checked.append("the draft with its verifier")
    if found.endpoint is not None:
        from specforge.checkpoints.verification.endpoint import endpoint_faults
        from specforge.engines.probing import measure  # the client takes a second to import

        if probe.served is None:
            raise UsageError(
                "--endpoint: the export was made with --skip_verifier, so it has no expected acceptance to compare; "
                "export again without it"
            )
        measured = measure(found.endpoint, probe.served.prompts)
        print(f"  {measured.engine}: {measured.acceptance_length:.3f} tokens per verifier pass")
        faults += endpoint_faults(measured, probe.served)
        checked.append("the server")
    for fault in faults:
        print(f"FAULT: {fault.what}\n  likely cause: {fault.cause}")
    if faults:
        print(f"{len(faults)} fault(s): do not serve this.")
        return 1
    print(f"Done: nothing is wrong ({', '.join(checked)}).")
    return 0


def command_line() -> ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = command_parser("verify", "EXPORT", DESCRIPTION)
    parser.add_argument("export", type=str, metavar="EXPORT", help="An export of specforge: a folder or a hub id.")
    add_verifier_flags(parser, "Folder or hub id; also run the draft with it.")
    parser.add_argument(
        "--endpoint", type=str | None, default=None, metavar="URL", help="Address of a server that serves the export."
    )
    return parser
