"""The printed command line of a server, and the check of a running one."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from extracting_server import ExtractingServer

from specforge.__main__ import main

CONFIGS = Path(__file__).parents[2] / "configs"
VERIFIER = CONFIGS / "quickstart" / "verifier"
CONFIG = ["--config", str(CONFIGS / "quickstart.yaml"), f"--verifier={VERIFIER}"]


@pytest.fixture
def printed(capsys) -> Callable[..., list[str]]:
    """Return the words of the printed line."""

    def serve(*words: str) -> list[str]:
        assert main(["serve-verifier", *CONFIG, *words, "--print"]) == 0
        return shlex.split(capsys.readouterr().out)

    return serve


def value(line: list[str], flag: str) -> Any:
    return json.loads(line[line.index(flag) + 1])


class TestServeVerifier:
    def test_the_line_has_what_extraction_needs(self, printed):
        line = printed("--folder", "/mnt/states", "--data.max_length", "300")
        assert line[:3] == ["vllm", "serve", str(VERIFIER)]
        speculation, connector = value(line, "--speculative-config"), value(line, "--kv-transfer-config")
        assert speculation["method"] == "extract_hidden_states" and speculation["num_speculative_tokens"] == 1
        layers = speculation["draft_model_config"]["hf_config"]["eagle_aux_hidden_state_layer_ids"]
        assert layers == [2, 4, 5, 8], "the last is the number of layers: before the final norm"
        assert connector["kv_connector"] == "ExampleHiddenStatesConnector" and connector["kv_role"] == "kv_producer"
        assert connector["kv_connector_extra_config"]["shared_storage_path"] == "/mnt/states"
        assert "--no-enable-prefix-caching" in line
        assert value(line, "--max-model-len") == 301 and value(line, "--tensor-parallel-size") == 1
        assert "--dtype" not in line and "--trust-remote-code" not in line

    def test_settings_of_the_verifier_and_the_machine_are_passed_on(self, printed):
        words = ["--tensor_parallel", "4", "--port", "8123", "--verifier_dtype", "bfloat16", "--verifier_revision=v2"]
        line = printed(*words, "--trust_remote_code", "true")
        assert value(line, "--tensor-parallel-size") == 4 and value(line, "--port") == 8123
        assert line[line.index("--dtype") + 1] == "bfloat16" and line[line.index("--revision") + 1] == "v2"
        assert "--trust-remote-code" in line

    def test_a_transport_sets_its_connector(self, printed):
        files = value(printed(), "--kv-transfer-config")
        line = printed("--data.feature_transport", "fp8")
        connector = value(line, "--kv-transfer-config")
        assert connector.pop("kv_connector_module_path") == "hs_connectors.fp8_hidden_states_connector"
        assert connector == {**files, "kv_connector": "FP8HiddenStatesConnector"}
        assert value(printed("--data.feature_transport=fp8", "--transport=file"), "--kv-transfer-config") == files

    def test_mooncake_is_an_extra(self, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "hs_connectors", None)
        assert main(["serve-verifier", *CONFIG, "--transport=mooncake", "--print"]) == 2
        message = " ".join(capsys.readouterr().err.split())
        assert "transport mooncake is not installed" in message and "specforge-lightning[mooncake]" in message

    def test_rows_as_long_as_the_context_are_allowed(self, printed):
        assert printed()[0] == "VLLM_ALLOW_LONG_MAX_MODEL_LEN=1", "512 tokens, and one that is asked for"

    @pytest.mark.parametrize("port", ["0", "65536", "-1", "http"])
    def test_a_port_that_cannot_be_is_refused(self, port, capsys):
        assert main(["serve-verifier", *CONFIG, f"--port={port}", "--print"]) == 2
        assert f"--port: must be a number from 1 to 65535, got '{port}'" in capsys.readouterr().err

    def test_without_vllm_it_says_what_to_do(self, capsys, monkeypatch):
        monkeypatch.setenv("PATH", "")
        assert main(["serve-verifier", *CONFIG]) == 2
        assert "vllm is not installed here" in capsys.readouterr().err


@pytest.fixture
def server(model, tmp_path) -> Iterator[ExtractingServer]:
    (tmp_path / "shared").mkdir()
    with ExtractingServer(model, [2, 4, 5, 8], tmp_path / "shared") as started:
        yield started


def faults(server: ExtractingServer, capsys, *words: str) -> str:
    """Return what is found, on one line."""
    status = main(["doctor", "--endpoint", server.url, *words])
    out = " ".join(capsys.readouterr().out.split())
    assert status == (1 if "FAULT" in out else 0)
    return out


class TestDoctor:
    def test_a_server_as_printed_is_in_order(self, server, capsys):
        assert "states of 4 layers, width 64, float32" in faults(server, capsys)
        out = faults(server, capsys, *CONFIG, "--compare")
        assert "within 0.00% of our own capture" in out and "Nothing is wrong" in out
        assert not any(server.folder.iterdir())

    def test_prefix_caching_is_found(self, server, capsys):
        def cached(number: int, tensors: Any) -> Any:
            states = tensors["hidden_states"]
            return {**tensors, "hidden_states": states[48:].contiguous() if number > 1 else states}

        server.written = cached
        assert "FAULT: there are states of 16 of the 64 tokens" in faults(server, capsys)

    def test_other_layers_are_found(self, server, capsys):
        server.layers = [2, 4, 8]
        assert "eagle_aux_hidden_state_layer_ids [2, 4, 5, 8]" in faults(server, capsys, *CONFIG)
        server.layers = [1, 4, 5, 8]
        out = faults(server, capsys, *CONFIG, "--compare")
        assert "FAULT: the server's states are those of other layers" in out and "{2: 1}" in out

    def test_another_verifier_is_found(self, server, capsys):
        server.model = deepcopy(server.model)
        with torch.no_grad():
            server.model.get_decoder().embed_tokens.weight.mul_(1.5)
        out = faults(server, capsys, *CONFIG, "--compare")
        assert "FAULT" in out and ("another verifier" in out or "other layers" in out)

    def test_faults_of_the_server_are_explained(self, server, capsys):
        server.extracts = False
        assert "FAULT: http://127.0.0.1" in faults(server, capsys)
        server.fault = lambda number: 401
        assert "refuses the API key" in faults(server, capsys)
        server.kill()
        assert "no connection" in faults(server, capsys)

    @pytest.mark.parametrize(
        "words", [["--compare"], ["--config", "x"], ["--endpoint"], ["--endpoint", "x"], ["--model", "x"]]
    )
    def test_wrong_usage_is_refused(self, words, capsys):
        assert main(["doctor", *words]) == 2
        assert "error:" in capsys.readouterr().err
