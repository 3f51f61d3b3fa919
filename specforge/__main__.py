"""The ``specforge`` command: choose the subcommand, import only what it needs."""

from __future__ import annotations

import os
import sys
import textwrap
import traceback
from collections.abc import Sequence

from specforge import __version__, interrupts, quiet
from specforge.errors import SpecforgeError, UsageError, describe_os_error, nearest_name
from specforge.hookspecs import Algorithm, Command
from specforge.registry import Registry, installed

PROGRAM = "specforge"
OPTIONS = ("--help", "--version", quiet.FLAG)
WORDS_OF_OTHERS = {
    "train": "fit",
    "finetune": "fit",
    "eval": "evaluate",
    "benchmark": "evaluate",
    "chat": "generate",
    "help": "--help",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        arguments: The words after ``specforge``; by default those of the process.

    Returns:
        The exit status: 0 for success, 1 for a failure at run time, 2 for wrong usage or configuration.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    verbose = quiet.FLAG in words
    words = [word for word in words if word != quiet.FLAG]
    name = words[0] if words else "--help"
    program = PROGRAM
    try:
        if name in ("-h", "--help"):
            print(help_text(installed()))
            return 0
        if name == "--version":
            print(f"{PROGRAM} {__version__}")
            return 0
        if name.startswith("-"):
            raise UsageError(f"unknown option {name!r}.{nearest_name(name, OPTIONS)} See: {PROGRAM} --help")
        with interrupts.raising_keyboard_interrupt(f"{PROGRAM} {name}"):
            if name in WORDS_OF_OTHERS and name not in installed().all(Command):
                raise UsageError(f"there is no command {name!r}. Did you mean {WORDS_OF_OTHERS[name]!r}?")
            command = installed().find(Command, name)
            program = f"{PROGRAM} {name}"
            quiet.configure_verbosity(verbose)
            # Spinning threads make everything many times slower on a CPU that other processes use too.
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
            return int(installed().load(command, "run")(words[1:]))
    except SpecforgeError as error:
        if verbose:
            traceback.print_exc()
        print(f"{' '.join(filter(None, (program, error.subcommand)))}: error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print(interrupts.message(program), file=sys.stderr)
        return interrupts.STATUS
    except BrokenPipeError:
        # The reader (`| head`) has closed the pipe; without this, the flush at exit would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # An unreadable path, a full disk: a traceback would not help.
        if verbose:
            traceback.print_exc()
        print(f"{program}: error: {describe_os_error(error)}", file=sys.stderr)
        return SpecforgeError.exit_status


def help_text(registry: Registry) -> str:
    """Return what ``specforge --help`` prints: the commands, how to start, and plugins that failed to load."""
    commands = registry.all(Command)
    width = max((len(name) for name in commands), default=0)
    lines = [
        "usage: specforge COMMAND [options]",
        "",
        "Train draft models for speculative decoding, measure them, and write checkpoints",
        "that engines load.",
        "",
        "commands:",
        *(f"  {name:<{width}}  {commands[name].summary}" for name in sorted(commands)),
        "",
        "options of every command:",
        "  --help     what it does, and all its options",
        f"  {quiet.FLAG}  show all messages of libraries, and tracebacks of errors",
        "",
        "start here:",
        "  specforge fit --config configs/quickstart.yaml  a small draft, in two minutes",
        "  specforge fit --algorithm NAME --help           every setting of an algorithm:",
        *(f"{'':<50}{line}" for line in textwrap.wrap(", ".join(sorted(registry.all(Algorithm))), 80 - 50)),
    ]
    broken = [plugin for plugin in registry.plugins if plugin.faults]
    if broken:
        lines += ["", f"{len(broken)} of {len(registry.plugins)} plugins have faults; see: specforge plugins"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
