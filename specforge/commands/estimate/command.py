"""``specforge estimate``: the cost of a run of ``fit`` before it starts."""

from __future__ import annotations

import argparse

from specforge.commands.trainer import choose
from specforge.commands.trainer import command_line as settings_of_all
from specforge.imports import without_collection

FLAGS = ("--tokens", "--supervised_share", "--device_flops", "--device_memory")
HELP = """\
usage: specforge estimate --config FILE [--config FILE ...] [--KEY VALUE ...]
                          [--tokens N --supervised_share S]
                          [--device_flops F] [--device_memory B]

Estimate the cost of specforge fit with the same configuration: disk for
stored features, memory on each device, operations per token, and time.
Nothing is loaded: the verifier's config.json is enough, and the real training
step runs on tensors without values.

  specforge estimate --config configs/quickstart.yaml
  specforge estimate --config FILE --verifier meta-llama/Llama-3.1-8B-Instruct \\
    --tokens 1000000000 --supervised_share 0.6 --trainer.precision bf16-mixed \\
    --trainer.accelerator gpu --device_flops 989e12

  --tokens N              Tokens per epoch, if there are no rows yet. Without
                          it, the rows of data.train are counted: prepared
                          rows, those of an earlier run, or a small file.
  --supervised_share S    Share of supervised tokens, from 0 to 1 (default: 1,
                          which costs most).
  --device_flops F        Operations per second of one device on large matrix
                          products, such as 989e12 for an H100 in bfloat16.
                          Without it, matrix products are timed here for a
                          second.
  --device_memory B       Bytes of memory of one device, such as 80e9, to say
                          what does not fit (default: that of this machine's
                          accelerator if the run is for one and it has one).

All settings of an algorithm: specforge estimate --algorithm NAME --help"""


def run(arguments: list[str]) -> int:
    """Estimate, and print."""
    with without_collection():
        algorithm = choose(arguments, HELP)
        if algorithm is None:
            return 0
        from specforge.commands.estimate.estimating import print_estimate_of

    print_estimate_of(algorithm, arguments)
    return 0


def command_line() -> argparse.ArgumentParser:
    """Return the parser of every algorithm's settings and the command's own flags."""
    parser = settings_of_all()
    for flag in FLAGS:
        parser.add_argument(flag)
    return parser
