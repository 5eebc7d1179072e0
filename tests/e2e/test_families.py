"""Families on the real engine: the prompt of a chat is the one that vLLM makes with the model's own template, and the
answer is the same, whole, streamed, and in a batch. A base model completes texts, and says that it has no chat.
"""

import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_vllm.hardware import computes_four_bits, on_cpu
from qwen_vllm.models.checks import ModelUnavailable
from qwen_vllm.protocol import ChatError, Reasoning, Sampling
from tests.support.tiny_checkpoints import write_quantized
from tests.support.tiny_families import CHATML, FAMILIES, Family
from vllm_wrapper import ChatModel

pytestmark = pytest.mark.long
GREEDY = Sampling(temperature=0, repetition_penalty=1, max_tokens=12)
CONVERSATIONS = [
    ("Be brief. ", [], "你好"),
    ("", [("1 + 1 = ?", " 2\n"), ("And 3?", "")], "  def f():\n\treturn '👩‍👩‍👧‍👦'\n"),
    ("You are a helpful assistant.", [("?", "!")] * 300, "One question more."),
]
TEXT = "The capital of France is Paris. 法国的首都是巴黎。" * 3
FEW_SHOT = "Q: 1 + 1?\nA: 2\n\nQ: 2 + 2?\nA: 4\n\nQ: 3 + 3?\nA:"
# A GPU holds all engines of the tests: vLLM gives none of its memory back to a process that goes on.
LOADED = {
    "max_num_seqs": 4,
    **({"dtype": "float32"} if on_cpu() else {"dtype": "float16", "gpu_memory_utilization": 0.05}),
}
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    """A process for one engine after the other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            yield process


@dataclass
class Said:
    """What a model said to the CONVERSATIONS: the prompts and greedy answers of vLLM's `LLM.chat`, and ours; thoughts
    are a part of them.
    """

    prompts: list[list[int]]
    texts: list[str]
    our_prompts: list[list[int]]
    our_texts: list[tuple[str, str, str]]
    dropped: int


def with_model(work: Callable[[ChatModel], Any], folder: str, **args: Any) -> Any:
    """What `work` returns for the model in `folder`, loaded for it alone."""
    from vllm.distributed import cleanup_dist_env_and_memory

    model = ChatModel(folder, **{**LOADED, **args})
    try:
        return work(model)
    finally:
        del model
        gc.collect()
        cleanup_dist_env_and_memory()


def chats(family: Family, model: ChatModel) -> Said:
    from vllm import SamplingParams

    builder, rows, ours = model._requests.prompts, [], []
    for system, history, query in CONVERSATIONS:
        rows.append({"system": system, "history": history, "query": query})
        whole = model.chat(query, history, system, GREEDY)
        *deltas, _ = model.stream_chat(query, history, system, GREEDY)
        streamed = "".join(delta.text if isinstance(delta, Reasoning) else delta for delta in deltas)
        ours.append((whole.reasoning + whole.text, streamed, whole.dropped_turns))
    batch = model.chat_batch(rows, GREEDY)
    kept = [(system, history[ours[i][2] :], query) for i, (system, history, query) in enumerate(CONVERSATIONS)]
    params = SamplingParams(temperature=0, max_tokens=GREEDY.max_tokens, stop_token_ids=[builder.stop_token_id])
    messages = [family.messages(*conversation) for conversation in kept]
    outputs = model.llm.chat(messages, params, chat_template=family.template, use_tqdm=False)
    return Said(
        prompts=[output.prompt_token_ids for output in outputs],
        # Line breaks at the end of a thought are no part of it.
        texts=[
            output.outputs[0].text.rstrip("\n" if result.reasoning else "")
            for output, result in zip(outputs, batch, strict=True)
        ],
        our_prompts=[builder.build(*conversation, 2**20).token_ids for conversation in kept],
        our_texts=[
            (whole, streamed, result.reasoning + result.text)
            for (whole, streamed, _), result in zip(ours, batch, strict=True)
        ],
        dropped=batch[-1].dropped_turns,
    )


def completes(model: ChatModel) -> tuple[str, list[str]]:
    with pytest.raises(ChatError) as refused:
        model.chat("Hello")
    return refused.value.message, model.complete_batch([FEW_SHOT, TEXT, FEW_SHOT], GREEDY)


def logprobs(model: ChatModel) -> list[float]:
    """Of the tokens of TEXT but the first."""
    from vllm import SamplingParams

    prompt = model.llm.get_tokenizer().encode(TEXT)
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    (output,) = model.llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    return [step[token].logprob for step, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]


def check(said: Said) -> None:
    assert said.our_prompts == said.prompts
    assert said.our_texts == [(text, text, text) for text in said.texts]
    assert 0 < said.dropped < 300
    assert "".join(said.texts)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.config])
def test_a_chat_is_what_the_models_own_template_makes_of_it(
    process: ProcessPoolExecutor, tmp_path: Path, name: str
) -> None:
    folder = str(FAMILIES[name].write(tmp_path))
    check(process.submit(with_model, partial(chats, FAMILIES[name]), folder).result())


def test_a_base_model_completes_texts_and_chats_with_a_template_that_is_named(
    process: ProcessPoolExecutor, tmp_path: Path
) -> None:
    folder = FAMILIES["Qwen2.5"].write(tmp_path / "base", small=True)
    (folder / "chat_template.jinja").rename(tmp_path / "named.jinja")
    message, (first, other, again) = process.submit(with_model, completes, str(folder)).result()
    assert "no chat template" in message and "/v1/completions" in message and "--chat-template" in message
    assert first == again != other
    (tmp_path / "named.jinja").write_text(CHATML)
    named = str(tmp_path / "named.jinja")
    check(process.submit(with_model, partial(chats, FAMILIES["Qwen1.5"]), str(folder), chat_template=named).result())


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_checkpoint_in_four_bits_says_what_its_bits_stand_for(
    process: ProcessPoolExecutor, tmp_path: Path, method: str
) -> None:
    plain = FAMILIES["Qwen2.5"].write(tmp_path / "plain", small=True, initializer_range=0.05, **WIDE)
    quantized = write_quantized(plain, tmp_path / "quantized", method)
    answer = process.submit(with_model, logprobs, str(quantized), quantization=method, dtype="float16")
    if not computes_four_bits():
        with pytest.raises(ModelUnavailable, match="AVX-512"):
            answer.result()
        return
    expected = process.submit(with_model, logprobs, str(plain)).result()
    torch.testing.assert_close(torch.tensor(answer.result()), torch.tensor(expected), atol=0.1, rtol=0)
