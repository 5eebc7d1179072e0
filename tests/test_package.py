"""The package as it is installed: a user's own files do not get in its way."""

import json
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

from qwen_vllm.network import listen
from tests.support import ROOT
from tests.support.programs import ENVIRONMENT

OURS = {"gradio_webui", "prompt_utils", "qwen_vllm", "vllm_client", "vllm_offline", "vllm_server", "vllm_wrapper"}
GENERIC = (
    "batch",
    "cache",
    "connection",
    "console",
    "guard",
    "hardware",
    "lifecycle",
    "model_utils",
    "models",
    "patches",
)
GENERIC += ("plugin", "protocol", "reasoning", "rows", "server", "shortcuts", "with_server")


def test_no_generic_name_is_installed() -> None:
    assert set((distribution("qwen-vllm").read_text("top_level.txt") or "").split()) == OURS


def test_a_users_own_files_change_nothing(tmp_path: Path) -> None:
    for name in GENERIC:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of the user ran')")
    program = "import vllm_client, vllm_offline, vllm_server, vllm_wrapper; from qwen_vllm.vllm_plugin import plugin"
    done = subprocess.run(
        [sys.executable, "-c", f"{program}; print(plugin.is_installed())"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.stdout, done.returncode) == ("True\n", 0), done.stderr


@pytest.mark.parametrize("name", ["./My Models/Qwen", "/home/李/模型's $1 \\ (neu)", "Qwen/Qwen3-8B"])
@pytest.mark.parametrize("target", ["chat", "webui", "serve", "offline"])
def test_make_hands_on_the_name_of_any_folder(tmp_path: Path, name: str, target: str) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    program.chmod(0o755)
    command = ["make", "-o", "setup", target, f"PY={program}", f"MODEL={name.replace('$', '$$')}", "ARGS=--port 8001"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    said = json.loads(done.stdout)
    assert said[said.index("--model") + 1 :][:3] == [name, "--port", "8001"]


@pytest.mark.parametrize("port", [65536, 99999, -1])
def test_a_port_that_does_not_exist(port: int) -> None:
    with pytest.raises(SystemExit, match=rf"^program: cannot listen on 127.0.0.1:{port} .*choose another --port$"):
        listen("program", "127.0.0.1", port)
