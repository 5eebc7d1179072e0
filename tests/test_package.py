"""The package as it is installed: a user's own files do not get in its way."""

import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

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
