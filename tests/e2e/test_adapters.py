"""LoRA adapters on the real engine: a tiny model with random weights, and random adapters that change its answers."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
import torch
from transformers import AutoTokenizer, Qwen2ForCausalLM

from qwen_vllm.protocol import ChatError, Sampling
from qwen_vllm.with_server import running_server
from tests.support.tiny_checkpoints import write_adapter, write_merged, write_text_model
from vllm_client import server_info, stream_chat
from vllm_wrapper import ChatModel

pytestmark = pytest.mark.long
MODELS = ["base", "poet", "lawyer"]
SYSTEM, TOKENS = "Be brief.", 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A model, two adapters for it, and the model with the first of them in its weights."""
    folder = tmp_path_factory.mktemp("lora")
    base, poet = write_text_model(folder / "base"), write_adapter(folder / "poet")
    lawyer = write_adapter(folder / "lawyer", seed=3, rank=8)
    return SimpleNamespace(base=base, poet=poet, lawyer=lawyer, merged=write_merged(folder / "merged", base, poet))


@pytest.fixture(scope="module")
def url(folders: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    adapters = [f"poet={folders.poet}", f"lawyer={folders.lawyer}"]
    flags = ["--model", str(folders.base), "--dtype", "float32", "--enable-lora", "--lora-modules", *adapters]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
        with running_server(flags, tmp_path_factory.mktemp("server") / "log") as url:
            yield url


def chat(url: str, query: str, model: str) -> str:
    sampling = Sampling(temperature=0, max_tokens=TOKENS, model=model)
    *_, result = stream_chat(url, query, system=SYSTEM, sampling=sampling)
    return result.text


def by_openai(url: str, query: str, model: str) -> str:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": query}]
    body = {"messages": messages, "model": model, "temperature": 0, "max_tokens": TOKENS}
    return requests.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()["choices"][0]["message"]["content"]


def by_transformers(folder: Path, query: str) -> str:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), Qwen2ForCausalLM.from_pretrained(folder)
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": query}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    with torch.no_grad():
        answer = model.generate(prompt, do_sample=False, max_new_tokens=TOKENS, pad_token_id=0)
    return tokenizer.decode(answer[0, prompt.shape[1] :], skip_special_tokens=True)


def test_an_adapter_answers_as_the_model_that_has_it_in_its_weights(url: str, folders: SimpleNamespace) -> None:
    answers = [chat(url, "你好", model) for model in MODELS]
    assert len(set(answers)) == len(MODELS)
    assert answers[:2] == [by_transformers(folders.base, "你好"), by_transformers(folders.merged, "你好")]
    assert answers == [by_openai(url, "你好", model) for model in MODELS]


def test_many_at_once_get_the_answers_of_their_models(url: str) -> None:
    """They are computed side by side, and their prompts begin alike: what is cached of one must not serve another."""
    asked = [("Tell me about the sea. " * 20 + str(n), model) for n in range(8) for model in MODELS]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda question: chat(url, *question), asked))
    assert all(len(set(together[i : i + len(MODELS)])) == len(MODELS) for i in range(0, len(asked), len(MODELS)))
    assert together == [chat(url, *question) for question in asked]


def test_an_unknown_adapter_is_refused_with_the_names_of_those_there_are(url: str) -> None:
    with pytest.raises(ChatError, match="only base, poet, lawyer") as caught:
        chat(url, "Hi", "writer")
    assert caught.value.status == 404


def test_an_adapter_that_is_loaded_later_is_known_and_answers(url: str, folders: SimpleNamespace) -> None:
    late = {"lora_name": "late", "lora_path": str(folders.poet)}
    assert requests.post(f"{url}/v1/load_lora_adapter", json=late, timeout=60).ok
    assert server_info(url).models == [*MODELS, "late"]
    assert chat(url, "你好", "late") == chat(url, "你好", "poet")
    assert requests.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": "late"}, timeout=60).ok
    with pytest.raises(ChatError, match="no such model"):
        chat(url, "你好", "late")


def answers_offline(base: Path, adapters: dict[str, str], merged: Path) -> tuple[list[str], str]:
    """What the model and its adapters say in one batch, and what the merged model says; in a process of its own."""
    sampling, query = Sampling(temperature=0, max_tokens=TOKENS), {"query": "你好", "system": SYSTEM}
    model = ChatModel(str(base), adapters=adapters, dtype="float32")
    rows = [query, *({**query, "model": name} for name in adapters)]
    said = [result.text for result in model.chat_batch(rows * 3, sampling)]
    return said, ChatModel(str(merged), dtype="float32").chat(sampling=sampling, **query).text


def test_adapters_offline(folders: SimpleNamespace) -> None:
    adapters = {"poet": str(folders.poet), "lawyer": str(folders.lawyer)}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        said, merged = process.submit(answers_offline, folders.base, adapters, folders.merged).result()
    assert said == said[:3] * 3
    assert len(set(said)) == 3
    assert said[1] == merged
