"""Tasks in several processes that train together on the CPU, started as on a cluster."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "clusters.md"

Task = tuple[str, Any]
"""A function of ``worker.py`` and its argument."""


def by_srun(processes: int, tasks: list[Task]) -> None:
    """Run tasks in a row with the environment that ``srun`` sets, one process on each of several nodes."""
    shared = {
        "SLURM_JOB_NAME": "train",
        "SLURM_JOB_ID": "1",
        "SLURM_NTASKS": str(processes),
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": str(processes),
        "SLURM_LOCALID": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    ranks = [{"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)} for rank in range(processes)]
    _wait_for([_start([sys.executable, str(WORKER)], tasks, {**shared, **rank}) for rank in ranks])


def by_torchrun(nodes: int, processes: int, tasks: list[Task]) -> None:
    """Run tasks in a row under the documented ``torchrun``, with several processes on each of several nodes."""
    words = documented("torchrun")
    values = {"--nnodes": nodes, "--nproc-per-node": processes, "--rdzv-endpoint": f"127.0.0.1:{_free_port()}"}
    for option, value in values.items():
        words[words.index(option) + 1] = str(value)
    torchrun = [sys.executable, "-m", "torch.distributed.run", *words[1 : words.index("-m")]]
    _wait_for([_start([*torchrun, str(WORKER)], tasks, {}) for _ in range(nodes)])


def documented(start: str) -> list[str]:
    """Return the words of the first command of docs/clusters.md with a given start."""
    lines = PAGE.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    return shlex.split(next(line for line in lines if line.startswith(f"{start} ")))


def _start(command: list[str], tasks: list[Task], environment: dict[str, str]) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(ROOT), *map(str, ROOT.glob("plugins/*")), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [*command, json.dumps(tasks)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _wait_for(started: list[subprocess.Popen[str]]) -> None:
    """Show the output of failed processes; end those that wait for dead ones."""
    try:
        outputs = [process.communicate(timeout=600)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    failed = [output for process, output in zip(started, outputs, strict=True) if process.returncode]
    assert not failed, failed[0][-4000:]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
