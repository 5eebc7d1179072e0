"""Tokenizers without a download, and stand-ins for the engine and for the server."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pexpect
import pytest
import requests
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks import shapes
from qwen_vllm.models.demo import demo_model
from qwen_vllm.models.qwen_v1 import SPECIAL_TOKENS
from qwen_vllm.with_server import SERVER, free_port
from tests.support.scripted_server import Server, scripted

KEY = "e2e-key"
"""The key of `demo_server`."""
ROOM, DEADLINE = 8, 2
"""Of `small_server`: requests at a time, and seconds that slow clients have."""
ROOT = Path(__file__).parents[1]
FRANCE = "What is the capital of France?"
# To fill a larger cache with zeros takes seconds of each start.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
"""As in a user's terminal, and not as under `make test`, where make tells of each folder it enters."""

# The parts of the model's own template that deal with plain conversations.
QWEN3_TEMPLATE = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


def pytest_configure() -> None:
    # A runner in the background has Ctrl-C ignored, and so would have what the tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # What needs no server goes first: meanwhile they start.
    items.sort(key=lambda item: ("e2e" in item.path.parts, item.get_closest_marker("last") is not None))


@contextmanager
def _server(flags: str, folder: Path) -> Iterator[SimpleNamespace]:
    port, path = free_port(), folder / "log"
    with path.open("wb") as log:
        command = [*SERVER, *flags.split(), "--port", str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    yield SimpleNamespace(process=process, url=f"http://127.0.0.1:{port}", port=port, log=path)
    process.terminate()
    process.wait(30)


@contextmanager
def _piped_chat(folder: Path) -> Iterator[subprocess.Popen]:
    environment, pipe = {**ENVIRONMENT, "PIPED_CHAT": "1"}, subprocess.PIPE
    with subprocess.Popen(
        ["make", "chat"], cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True
    ) as process:
        process.stdin.write(f"{FRANCE}\n")
        process.stdin.close()
        process.stdin = None
        yield process
        process.terminate()


@contextmanager
def _offline_chat(folder: Path) -> Iterator[pexpect.spawn]:
    command = ["vllm_offline.py", "--temperature", "0", "--max-model-len", "2048"]
    environment = {**ENVIRONMENT, "XDG_STATE_HOME": str(folder), "PROMPT_TOOLKIT_NO_CPR": "1"}
    terminal = {"encoding": "utf-8", "timeout": 120, "dimensions": (40, 100)}
    chat = pexpect.spawn(sys.executable, command, cwd=ROOT, env=environment, **terminal)
    yield chat
    chat.close(force=True)


PROGRAMS = {
    "demo_server": partial(_server, f"--api-key {KEY}"),
    "small_server": partial(
        _server,
        f"""--max-num-seqs 4 --max-num-queued-reqs {ROOM}
        --max-model-len 512 --block-size 32 --num-gpu-blocks-override 18
        --header-timeout {DEADLINE} --body-timeout {DEADLINE} --write-timeout {DEADLINE}""",
    ),
    "piped_chat": _piped_chat,
    "offline_chat": _offline_chat,
}
"""By the fixtures that give them."""


@pytest.fixture(scope="session", autouse=True)
def started(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The real programs with the demo model that selected tests want; they start beside the first tests."""
    wanted = {name for item in request.session.items for name in item.fixturenames}
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(start(tmp_path_factory.mktemp(name)))
            for name, start in PROGRAMS.items()
            if name in wanted
        }


@pytest.fixture(scope="session")
def demo_server(started: dict[str, Any]) -> str:
    """The address of one server for all tests that need no flags; the last one stops it."""
    return _ready(started["demo_server"]).url


@pytest.fixture(scope="session")
def small_server(started: dict[str, Any]) -> SimpleNamespace:
    """A server with little room and short deadlines; the last test stops its engine."""
    return _ready(started["small_server"])


@pytest.fixture(scope="session")
def piped_chat(started: dict[str, Any]) -> subprocess.Popen:
    """`make chat`, asked FRANCE from a pipe; its processes have PIPED_CHAT in their environment."""
    return started["piped_chat"]


@pytest.fixture(scope="session")
def offline_chat(started: dict[str, Any]) -> pexpect.spawn:
    """The offline REPL in a terminal."""
    return started["offline_chat"]


def _ready(server: SimpleNamespace) -> SimpleNamespace:
    while True:
        with suppress(requests.ConnectionError):
            if requests.get(f"{server.url}/ready", timeout=10).ok:
                return server
        assert server.process.poll() is None, f"the server did not start: see {server.log}"
        time.sleep(0.2)


@pytest.fixture(scope="session")
def demo_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(demo_model())


@pytest.fixture(scope="session")
def qwen_tokenizer() -> PreTrainedTokenizerBase:
    """Qwen2.5's vocabulary, real, and its chat template."""
    return shapes.qwen_tokenizer()


@pytest.fixture(scope="session")
def qwen3_tokenizer() -> PreTrainedTokenizerBase:
    """Qwen3's control tokens and chat template, on a vocabulary of single bytes."""
    return byte_tokenizer(QWEN3_TEMPLATE)


def byte_tokenizer(chat_template: str, *further_tokens: str) -> PreTrainedTokenizerBase:
    """Qwen's control tokens and further ones, on a vocabulary of single bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = Tokenizer(models.BPE({character: n for n, character in enumerate(alphabet)}, []))
    vocabulary.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary.decoder = decoders.ByteLevel()
    vocabulary.add_special_tokens([*SPECIAL_TOKENS, *further_tokens])
    return shapes.with_control_tokens(vocabulary, chat_template)


def write_model(folder: Path, **config: Any) -> Path:
    """The files of a model as far as they are looked at before it is loaded; `config` goes into its config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["Qwen2ForCausalLM"], **config}))
    (folder / "tokenizer.json").write_text("{}")
    save_file({"weight": np.zeros(100, np.float32)}, folder / "model.safetensors")
    return folder


MAX_BODY = 2**20


def guard_args(**flags: Any) -> Namespace:
    """The command line as the guard sees it, with its defaults."""
    defaults = {"api_key": None, "max_body_size": MAX_BODY, "body_timeout": 30.0}
    return Namespace(**{**defaults, "disable_fastapi_docs": False, "enable_offline_docs": False, **flags})


class ScriptedEngine:
    """Stands in for vLLM's AsyncLLM and records its calls.

    Each call of `generate` plays the next script: a string is a piece of the answer (one token), an exception is
    raised, `...` waits for ever. A script that ends finishes the answer with `finish`: finish and stop reason.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *scripts: list[Any],
        finish: tuple[str, str | int | None] = ("stop", None),
        context: int = 2048,
        configured: dict[str, Any] | None = None,
    ) -> None:
        self._tokenizer, self._scripts, self._finish = tokenizer, list(scripts), finish
        self.model_config = SimpleNamespace(
            max_model_len=context,
            is_multimodal_model=False,
            get_diff_sampling_param=lambda: dict(configured or {}),
        )
        self.calls: list[SimpleNamespace] = []

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer

    async def generate(
        self, prompt: dict[str, Any], params: Any, request_id: str, *, lora_request: Any = None
    ) -> AsyncIterator[SimpleNamespace]:
        call = SimpleNamespace(
            prompt=self._tokenizer.decode(prompt["prompt_token_ids"]),
            token_ids=prompt["prompt_token_ids"],
            params=params,
            request_id=request_id,
            lora_request=lora_request,
            aborted=False,
        )
        self.calls.append(call)
        pieces = []
        try:
            for step in self._scripts.pop(0):
                if isinstance(step, Exception):
                    raise step
                if step is ...:
                    await asyncio.Event().wait()
                pieces.append(step)
                if params.output_kind.name == "DELTA":
                    yield self._output([step])
        except (asyncio.CancelledError, GeneratorExit):
            call.aborted = True
            raise
        yield self._output([""] if params.output_kind.name == "DELTA" else [*pieces, ""], self._finish)

    def _output(self, pieces: list[str], finish: tuple[str | None, str | int | None] = (None, None)) -> SimpleNamespace:
        token_ids = [self._tokenizer.get_vocab().get(piece, 0) for piece in pieces]
        completion = SimpleNamespace(
            text="".join(pieces), token_ids=token_ids, finish_reason=finish[0], stop_reason=finish[1]
        )
        return SimpleNamespace(outputs=[completion], finished=finish[0] is not None)


@pytest.fixture
def scripted_engine(qwen3_tokenizer: PreTrainedTokenizerBase) -> Callable[..., ScriptedEngine]:
    return partial(ScriptedEngine, qwen3_tokenizer)


@pytest.fixture
def server() -> Iterator[Server]:
    with scripted() as server:
        yield server


CONVERSATIONS = [
    ("", [("Hi", "Hello!")], "Tell me about the sea."),
    ("You are a pirate.\n", [("1 + 1?", "2"), ("", "?")], " Who are you?\n"),
]


@pytest.fixture(scope="session")
def first_said() -> dict[str, list[str]]:
    """The demo model's greedy answers to the CONVERSATIONS, by the way in that was tried first: all say the same."""
    return {}
