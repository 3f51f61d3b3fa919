"""The files for clusters: the job script runs to its end with stand-ins for SLURM, and every command is one of ours."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from specforge.commands import serve_verifier
from specforge.commands.configured import module_and_data
from specforge.commands.prepare import features

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "examples" / "cluster"
VERIFIER = Path(__file__).parents[2] / "configs/models/verifiers/meta-llama/Llama-3.3-70B-Instruct"
CONFIG = "configs/models/llama-3.3-70b-eagle3.yaml"
# Each stand-in notes its arguments; a server runs until it is stopped.
STAND_INS = {
    "scontrol": "printf 'a\\nb\\nc\\n'",
    "srun": """python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "$@" >> "$NOTED"
case " $* " in *" serve-verifier "*) ${FAULT:-exec sleep 60} ;; esac""",
}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"input_ids": [1, 2, 3, 4], "loss_mask": [0, 0, 1, 1]}) + "\n")
    return path


def run_job(
    tmp_path: Path, curl: str = "true", **environment: str
) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """Run the job script with stand-ins; return its outcome and the arguments of each srun."""
    for name, line in {**STAND_INS, "curl": curl}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    noted = tmp_path / "noted"
    noted.touch()
    variables = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "NOTED": str(noted),
        "CONFIG": CONFIG,
        "SHARED": str(tmp_path / "shared"),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "a,b,c",
        **environment,
    }
    done = subprocess.run(
        ["bash", str(CLUSTER / "slurm.sh")], env=variables, capture_output=True, text=True, timeout=60, check=False
    )
    return done, [json.loads(line) for line in noted.read_text().splitlines()]


def of_specforge(words: list[str]) -> list[str]:
    """Return the part of a command line after the name of our program."""
    return words[words.index("specforge") + 1 :]


def parse(words: list[str], rows: Path) -> None:
    """Parse one of our command lines, with a verifier and rows that exist here."""
    words = [re.sub(r"^/shared/rows/\w+$", str(rows), word) for word in words]
    more = ["--verifier", str(VERIFIER), "--data.train", str(rows), "--data.validation", str(rows)]
    if words[0] == "serve-verifier":
        found, rest = serve_verifier.command_line().parse_known_args(words[1:])
        assert found.folder and found.tensor_parallel == 8
    elif words[:2] == ["prepare", "features"]:
        found, rest = features.command_line().parse_known_args(words[2:])
        assert found.output and found.endpoint
    else:
        assert words[0] == "fit"
        rest = words[1:]
    module, _ = module_and_data([*rest, *more])
    assert module.aux_layers


def test_the_job_serves_captures_and_trains(tmp_path: Path, rows: Path) -> None:
    done, noted = run_job(tmp_path)
    assert done.returncode == 0, done.stderr
    # The server runs in the background, so it may be noted late.
    server, capture, training = sorted(noted, key=lambda one: ("serve-verifier" not in one, "torchrun" in one))
    assert "--nodelist=a" in server and "--nodelist=b" in capture and "--nodelist=b,c" in training
    for one in (server, capture, training):
        parse(of_specforge(one), rows)
    assert capture[capture.index("--endpoint") + 1 :] == ["http://a:8000/v1"]
    assert "torchrun" in training and training[training.index("--nnodes") + 1] == "2"
    assert training[training.index("--trainer.num_nodes") + 1] == "2"
    assert training[-2:] == ["--data.features", capture[capture.index("--output") + 1]]
    assert not (tmp_path / "shared" / "states-7").exists()


def test_a_server_that_ends_ends_the_job(tmp_path: Path) -> None:
    done, noted = run_job(tmp_path, curl="exit 1", FAULT="exit 1", SERVERS="2")
    assert done.returncode == 1 and "a server has ended" in done.stderr
    assert len(noted) == 2


@pytest.mark.parametrize(
    ("environment", "status", "message"), [({"SERVERS": "3"}, 2, "no node is left"), ({"CONFIG": ""}, 1, "CONFIG")]
)
def test_a_job_that_cannot_run_ends_at_once(
    tmp_path: Path, environment: dict[str, str], status: int, message: str
) -> None:
    done, noted = run_job(tmp_path, **environment)
    assert done.returncode == status and message in done.stderr and not noted


def manifests() -> Iterator[dict[str, Any]]:
    for name in ("servers.yaml", "features.yaml", "train.yaml"):
        yield from yaml.safe_load_all((CLUSTER / name).read_text())


def pods() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield name, labels and specification of each workload's pods."""
    for one in manifests():
        if one["kind"] in ("Deployment", "Job"):
            template = one["spec"]["template"]
            labels = {**template.get("metadata", {}).get("labels", {}), "job-name": one["metadata"]["name"]}
            yield one["metadata"]["name"], labels, template["spec"]


def test_kubernetes_objects_fit_together() -> None:
    kinds = {"PersistentVolumeClaim": "v1", "Service": "v1", "Deployment": "apps/v1", "Job": "batch/v1"}
    found = list(manifests())
    assert all(one["apiVersion"] == kinds[one["kind"]] for one in found)
    claims = {one["metadata"]["name"] for one in found if one["kind"] == "PersistentVolumeClaim"}
    for one in found:
        if one["kind"] == "Deployment":
            labels = one["spec"]["template"]["metadata"]["labels"]
            assert one["spec"]["selector"]["matchLabels"].items() <= labels.items()
        if one["kind"] == "Service":
            assert any(one["spec"]["selector"].items() <= labels.items() for _, labels, _ in pods())
    for name, _, spec in pods():
        (container,) = spec["containers"]
        assert container["image"] == "specforge"
        assert all(isinstance(word, str) for word in container["args"]), name
        assert all(set(one) == {"name", "value"} for one in container["env"])
        assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in spec["volumes"]}
        used = {one["persistentVolumeClaim"]["claimName"] for one in spec["volumes"] if "persistentVolumeClaim" in one}
        assert used == claims
        if "subdomain" in spec:
            assert any(one["kind"] == "Service" and one["metadata"]["name"] == spec["subdomain"] for one in found)


@pytest.mark.parametrize("name", [name for name, *_ in pods()])
def test_a_pod_runs_one_of_our_commands(name: str, rows: Path) -> None:
    (container,) = next(spec["containers"] for other, _, spec in pods() if other == name)
    words = container["args"]
    if "command" in container:
        assert container["command"] == ["torchrun"] and "-m" in words
        jobs = {one["metadata"]["name"]: one["spec"] for one in manifests()}
        assert words[words.index("--nnodes") + 1] == str(jobs[name]["completions"])
        words = of_specforge(words)
    parse(words, rows)


def test_the_image_holds_what_the_package_needs() -> None:
    copied = re.findall(r"^COPY (.+) \S+$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    assert names >= {"pyproject.toml", "README.md", "LICENSE", "specforge", "plugins", "configs"}
    assert all((ROOT / name).exists() for name in names)
