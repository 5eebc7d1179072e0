"""deploy/llama-swap.yaml: what it starts is our server, under the name of the model."""

import shlex
from pathlib import Path

import pytest
import yaml

from tests.support import ROOT
from tests.support.tiny_checkpoints import write_model
from vllm_server import parse_args

KNOWN = {"healthCheckTimeout", "globalTTL", "unloadTimeout", "includeAliasesInList", "macros", "models"}
KNOWN_OF_A_MODEL = {"cmd", "proxy", "checkEndpoint", "concurrencyLimit", "ttl", "aliases"}
"""The fields that the file uses, as llama-swap's documentation and schema of August 2026 spell them."""


def test_llama_swap_starts_a_server_by_the_name_of_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tmp_path)
    monkeypatch.setattr("qwen_vllm.models.resolve.fetch", lambda *_: model)
    settings = yaml.safe_load((ROOT / "deploy/llama-swap.yaml").read_text())
    assert settings.keys() == KNOWN
    for name, served in settings["models"].items():
        assert {"cmd", "proxy", "checkEndpoint"} <= served.keys() <= KNOWN_OF_A_MODEL
        command = served["cmd"].replace("${server}", settings["macros"]["server"]).replace("${PORT}", "0")
        python, program, *flags = shlex.split(command)
        assert (python, program) == (".venv/bin/python", "vllm_server.py")
        args = parse_args(flags)
        assert args.served_model_name == [name]
        assert args.shutdown_timeout < settings["unloadTimeout"]
