"""Clients of others against one server with a scripted model, as a table: `make test-clients`.

Each client is asked for a plain answer, a streamed one, and a call whose result goes back, or for the scores of a task;
then with a wrong key, and while the server is busy. What it needs is in .clients/, which is made here of
requirements.txt and package.json. The clients that need node are left out where there is none.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import requests

from qwen_vllm.with_server import running_server
from tests.support import ROOT
from tests.support.tiny_reciter import write_reciter
from tests.support.tokenizers import qwen_tokenizer
from tests.support.tool_templates import (
    JSON_TOOLS,
    OBJECT,
    PLAIN,
    RESULT,
    SAID,
    WEATHER_ARGUMENTS,
    as_json,
    recited,
    scripted,
)

HERE, INSTALLED = Path(__file__).parent, ROOT / ".clients"
PYTHON = str(INSTALLED / "bin" / "python")
KEY, ROOM = "clients-key", 8
USUAL = ("plain", "streamed", "tools")
PYTHON_CLIENTS = {
    "openai": (*USUAL, "streamed tools", "completions", "schema"),
    "openai_responses": USUAL,
    "anthropic": (*USUAL, "streamed tools"),
    "litellm": USUAL,
    "langchain_openai": USUAL,
    "pydantic_ai": USUAL,
    "openai_agents": USUAL,
    "llm": USUAL,
    "qwen_agent": ("streamed", "tools"),
    "lm_eval": ("scores",),
    "evalscope": ("scores",),
}
"""And what each is asked; they are in python_clients.py."""
NODE_CLIENTS = dict.fromkeys(("ai_sdk", "anthropic_sdk"), (*USUAL, "streamed tools"))
"""Each has a file of its own, beside case.mjs, which they share."""
AGENTS = {
    "<|object_ref_start|>": ("Bash", {"command": "echo 3 > made"}),
    "<|object_ref_end|>": ("run_shell_command", {"command": "echo 3 > made", "is_background": False}),
    "<|box_start|>": ("exec_command", {"cmd": "echo 3 > made"}),
}
"""The calls for the tools of Claude Code, Qwen Code and Codex, and the tokens on which the model makes them."""
CALLS = {
    "claude_code": ("claude", "-p", "?", "--model", "Scripted", "--allowedTools", "Bash"),
    "qwen_code": ("qwen", "-p", "?", "--yolo", "--model", "Scripted", "--auth-type", "openai"),
    "codex": (
        *("codex", "exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", "-m", "Scripted"),
        *("-c", "model_provider=qwen", "-c", 'model_providers.qwen.name="qwen"'),
        *("-c", 'model_providers.qwen.base_url="URL/v1"', "-c", 'model_providers.qwen.env_key="QWEN_API_KEY"'),
        *("-c", 'model_providers.qwen.wire_api="responses"', "?"),
    ),
}
PATIENT = {"qwen_code"}
"""They ask a busy server again for minutes, longer than is waited for here."""


def main() -> int:
    """Return how often a client saw something else than it should."""
    chosen = sys.argv[1:]
    install()
    clients = {name: cases for name, cases in all_clients().items() if not chosen or name in chosen}
    wrong = 0
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        flags = ["--model", str(write_model(Path(folder))), "--served-model-name", "Scripted", "--api-key", KEY]
        flags += ["--max-num-queued-reqs", str(ROOM)]
        url = stack.enter_context(running_server(flags, Path(folder) / "log"))
        for name, cases in clients.items():
            seen = {case: judged(case, ask(name, case, url, KEY)) for case in cases}
            seen["wrong key"] = refused(ask(name, cases[0], url, "wrong"), "401", "valid key", "Not logged in")
            wrong += tell(name, seen)
        stack.enter_context(busy(url))
        for name, cases in clients.items():
            patience = ["timeout"] if name in PATIENT else []
            answer = ask(name, cases[0], url, KEY)
            wrong += tell(name, {"busy": refused(answer, "503", "overloaded", "busy", "queue", *patience)})
    return wrong


def tell(name: str, seen: dict[str, str]) -> int:
    """Print what a client saw, and return how much of it was not right."""
    print(f"{name:18}", " · ".join(f"{case}: {what}" for case, what in seen.items()), flush=True)
    return sum(what != "right" for what in seen.values())


def install() -> None:
    """Make .clients what requirements.txt and package.json say."""
    wanted = "".join((HERE / name).read_text() for name in ("requirements.txt", "package.json"))
    done = INSTALLED / "installed"
    if not done.exists() or done.read_text() != wanted:
        install_packages()
        done.write_text(wanted)
    for module in HERE.glob("*.mjs"):
        shutil.copy(module, INSTALLED)  # node looks for packages from there


def install_packages() -> None:
    """Make .clients anew."""
    shutil.rmtree(INSTALLED, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", INSTALLED], check=True)
    subprocess.run([PYTHON, "-m", "pip", "install", "--quiet", "-r", HERE / "requirements.txt"], check=True)
    if shutil.which("npm"):
        shutil.copy(HERE / "package.json", INSTALLED)
        subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--silent"], cwd=INSTALLED, check=True)


def all_clients() -> dict[str, tuple[str, ...]]:
    """List the clients that can run here, and what each is asked."""
    if not shutil.which("node"):
        return PYTHON_CLIENTS
    return {**PYTHON_CLIENTS, **NODE_CLIENTS, **dict.fromkeys(CALLS, ("tools",))}


def write_model(folder: Path) -> Path:
    """Write a model that answers as `tool_templates.recited`, and calls the tools of the AGENTS."""
    template = scripted(JSON_TOOLS).replace(
        "usual = 2 if messages[-1].role == 'tool' else 1 if tools else 0",
        "usual = 2 if messages | selectattr('role', 'equalto', 'tool') | list else 1 if 'get_weather' in tools | "
        "default([], true) | map(attribute='function.name') else 0",
    )
    for token, (name, _) in AGENTS.items():
        template = template.replace(
            "{{- [",
            f"{{%- if usual == 0 and '{name}' in tools | default([], true) | map(attribute='function.name') %}}"
            f"{{%- set say = {len(SAID) + [*AGENTS].index(token)} %}}{{%- endif %}}{{{{- [",
            1,
        )
    template = template.replace(str([*SAID]), str([*SAID, *AGENTS]))
    calls = [f"{token}{as_json(*call)}<|im_end|>" for token, call in AGENTS.items()]
    write_reciter(folder / "model", qwen_tokenizer(template, *SAID, *AGENTS), *recited(as_json), *calls)
    return folder / "model"


def ask(name: str, case: str, url: str, key: str) -> dict[str, Any]:
    """Run one client."""
    if name in CALLS:
        return ask_agent(name, url, key)
    command = [PYTHON, str(HERE / "python_clients.py"), name, case, url, key]
    if name in NODE_CLIENTS:
        command = ["node", f"{name}.mjs", case, url, key]
    done = subprocess.run(command, cwd=INSTALLED, capture_output=True, text=True, timeout=120, check=False)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return {"said": "", "called": [], "error": (done.stderr or done.stdout)[-500:]}


def ask_agent(name: str, url: str, key: str) -> dict[str, Any]:
    """Run one agent of the command line in an empty folder, with an empty home."""
    command = [part.replace("URL", url) for part in CALLS[name]]
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder, "home")
        home.mkdir()
        environment = {
            "HOME": str(home), "PATH": os.environ["PATH"], "ANTHROPIC_BASE_URL": url, "ANTHROPIC_AUTH_TOKEN": key,
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "ANTHROPIC_SMALL_FAST_MODEL": "Scripted",
            "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "1000", "CLAUDE_CODE_MAX_RETRIES": "1",
            "OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": key, "QWEN_API_KEY": key,
        }  # fmt: skip
        command[0] = str(INSTALLED / "node_modules" / ".bin" / command[0])
        try:
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            return {"said": "", "called": [], "error": f"timeout: {error.stdout!r:.500} {error.stderr!r:.500}"}
        made = Path(folder, "made").exists()
    answered = RESULT in done.stdout
    error = "" if answered else done.stdout[-700:] + done.stderr[-700:]
    return {"said": done.stdout if answered else "", "called": [WEATHER_ARGUMENTS] if made else [], "error": error}


@contextmanager
def busy(url: str) -> Iterator[None]:
    """Keep the server as busy as it can be."""
    body = {"model": "Scripted", "prompt": "?", "ignore_eos": True, "max_tokens": 60_000, "stream": True}
    headers = {"Authorization": f"Bearer {KEY}"}
    with ThreadPoolExecutor(ROOM) as pool, ExitStack() as stack:

        def post(_):
            return requests.post(f"{url}/v1/completions", json=body, headers=headers, stream=True, timeout=60)

        for answer in pool.map(post, range(ROOM)):
            stack.enter_context(answer)
            answer.raise_for_status()
        yield


def judged(case: str, answer: dict[str, Any]) -> str:
    """Say "right", or what came."""
    said = {"schema": OBJECT, "scores": "0.5"}.get(case, RESULT if "tools" in case else PLAIN)
    called = [WEATHER_ARGUMENTS] if "tools" in case else []
    right = said in answer["said"] and answer["called"] == called and not answer["error"]
    return "right" if right else json.dumps(answer, ensure_ascii=False)


def refused(answer: dict[str, Any], *words: str) -> str:
    """Say "right" where the error tells what went wrong, else what came."""
    right = not answer["said"].strip() and any(word in answer["error"] for word in words)
    return "right" if right else json.dumps(answer, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(main())
