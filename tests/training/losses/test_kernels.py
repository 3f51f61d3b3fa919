"""The kernels of the loss without a GPU: their results in Triton's interpreter, and their code for three GPUs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from specforge.estimation.shapes import ShapeMode
from specforge.training.losses import fused
from specforge.training.losses.chunks import for_accelerator
from specforge.training.losses.comparison import Term
from specforge.training.losses.fused import why_not_fused
from specforge.training.losses.kernel import pair_gradient_, pair_sums, row_statistics
from specforge.training.losses.named import chain_weighting, objective_terms

HERE = Path(__file__).parent
WITH_TRITON = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed: pip install -e '.[kernels]'"
)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@WITH_TRITON
def test_results_in_the_interpreter() -> None:
    """A process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    paths = filter(None, [str(HERE), os.environ.get("PYTHONPATH")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n0", str(HERE / "interpreted_kernels.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr


MATRIX, NUMBERS, INDICES = "*bf16", "*fp32", "*i64"
PAIRS = {"logits": MATRIX, "verifier": MATRIX, "normaliser": NUMBERS, "of_draft": NUMBERS, "target_of": INDICES}
SIZES = {"stride": "i32", "verifier_stride": "i32", "size": 32000, "pairs": "i32"}
FLAGS = dict.fromkeys(("FORWARD", "REVERSE", "MIDDLE", "ACCEPTANCE", "TEXT", "BEST"), True) | {"FURTHER": 10}
KERNELS: dict[str, dict[str, Any]] = {
    "_row_statistics": {
        **{"logits": MATRIX, "normaliser": NUMBERS, "top": INDICES, "stride": "i32", "size": 128256},
    },
    "_pair_sums": {**PAIRS, "sums": NUMBERS, "top": INDICES, **SIZES},
    "_pair_gradient": {**PAIRS, "sums": NUMBERS, "tokens": INDICES, "factors": NUMBERS, **SIZES, **FLAGS},
}


@WITH_TRITON
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", KERNELS)
def test_compiled_code_keeps_its_values_in_registers(
    name: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 128 registers a thread, so that 512 threads run on a multiprocessor; rows are read 16 bytes at a time."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from specforge.training.losses import triton_rows

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    arguments = {**KERNELS[name], "BLOCK": triton_rows.BLOCK}
    constants = {key: value for key, value in arguments.items() if not isinstance(value, str)}
    source = ASTSource(
        fn=getattr(triton_rows, name),
        signature={key: "constexpr" if key in constants else value for key, value in arguments.items()},
        constexprs=constants,
        # Triton finds out at a launch which arguments are multiples of 16: addresses and lengths of rows.
        attrs={
            (number,): [["tt.divisibility", 16]]
            for number, key in enumerate(arguments)
            if key not in constants and key != "pairs"
        },
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": triton_rows.WARPS}
    )
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    used = _shown(triton, "--dump-resource-usage", binary)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", used)
    assert found is not None, used
    registers, stack, local = map(int, found.groups())
    assert registers <= 128 and stack == 0 and local == 0, used
    code = _shown(triton, "-sass", binary)
    assert "LDG.E.128" in code and not re.search(r"\b(LDL|STL)\b", code)


def _shown(triton: Any, option: str, binary: Path) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([program, option, binary], capture_output=True, text=True, check=True).stdout


def test_operators_run_on_tensors_without_values() -> None:
    """What counts a step for a GPU sees each of them as one operation."""
    with ShapeMode():
        logits, verifier = torch.empty(6, 40, dtype=torch.bfloat16), torch.empty(2, 40, dtype=torch.bfloat16)
        normaliser, top = row_statistics(verifier)
        sums, best = pair_sums(logits, verifier, normaliser, normaliser, torch.zeros(6, dtype=torch.int64))
        tokens, factors = torch.zeros(2, 6, dtype=torch.int64), torch.zeros(6, 6)
        given = logits, verifier, normaliser, normaliser, torch.zeros(6, dtype=torch.int64)
        assert pair_gradient_(*given, sums, tokens, factors, [True] * 6) is None
        assert (normaliser.shape, normaliser.dtype, top.shape, top.dtype) == ((2,), torch.float32, (2,), torch.int64)
        assert (sums.shape, sums.dtype, best.shape, best.dtype) == ((8, 6), torch.float32, (6,), torch.int64)


def test_what_kernels_compute_and_what_they_leave_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_has_triton", lambda: True)
    every = objective_terms({"kl": 1.0, "lk_lambda": 0.5, "text": 1.0})
    half = torch.bfloat16
    assert why_not_fused(CUDA, half, every, chain_weighting("dpace")) is None
    assert "cpu" in str(why_not_fused(CPU, half, every, None))
    assert "float64" in str(why_not_fused(CUDA, torch.float64, every, None))
    assert why_not_fused(CUDA, half, objective_terms({"kl": 1.0, "top_k": 1.0}), None) is None
    own = Term("own", 1.0, lambda rows: rows.log_q[:, 0])
    assert "own" in str(why_not_fused(CUDA, half, [*every, own], None))
    monkeypatch.setattr(fused, "_has_triton", lambda: False)
    assert "Triton" in str(why_not_fused(CUDA, half, every, None))
    # An estimate is for a GPU that has it.
    token = for_accelerator.set(True)
    assert why_not_fused(CPU, half, every, None) is None
    for_accelerator.reset(token)
