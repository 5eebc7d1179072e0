"""First-generation Qwen on the real engine: it says what the published network with the same weights says."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from qwen_vllm.cache import CACHE
from qwen_vllm.protocol import ChatResult, Sampling
from tests.support.qwen_v1_reference import CONFIG, logits, random_weights, write_checkpoint
from vllm_wrapper import ChatModel

pytestmark = pytest.mark.long
TEXT = "The capital of France is Paris. 法国的首都是巴黎，👩‍👩‍👧‍👦 lives there since 1987!\n\n" * 4
CHAT = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
ANSWER = 20


@dataclass
class Said:
    """What the engine said: a text of `context` tokens, of which it wrote the last ANSWER, and the logprob of each but
    the first; an answer in a chat, and what it wrote after the same chat as raw text.
    """

    context: int
    token_ids: list[int]
    logprobs: list[float]
    chat: ChatResult
    completion: str


def ask(folder: str) -> Said:
    """Loads the checkpoint in `folder` and asks it; runs in a process of its own, with no other engine in it."""
    from vllm import SamplingParams

    model = ChatModel(folder, dtype="float32")
    context = model.llm.model_config.max_model_len
    prompt = model.llm.get_tokenizer().encode(TEXT)[: context - ANSWER]
    params = SamplingParams(temperature=0, max_tokens=ANSWER, prompt_logprobs=0, logprobs=0, ignore_eos=True)
    (output,) = model.llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    answer = output.outputs[0]
    token_ids = [*prompt, *answer.token_ids]
    steps = [*output.prompt_logprobs[1:], *answer.logprobs]
    greedy = Sampling(temperature=0, repetition_penalty=1, max_tokens=8)
    return Said(
        context=context,
        token_ids=token_ids,
        logprobs=[step[token].logprob for step, token in zip(steps, token_ids[1:], strict=True)],
        chat=model.chat("你好", system="Be brief.", sampling=greedy),
        completion=model.complete_batch([CHAT.format("Be brief.", "你好")], greedy)[0],
    )


def test_it_says_what_the_published_network_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random_weights(CONFIG)
    source = write_checkpoint(tmp_path / "Qwen-Tiny-Chat", weights)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(CACHE.parent / "vllm"))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        said = process.submit(ask, str(source)).result()

    assert said.context == len(said.token_ids) == CONFIG["seq_length"]
    expected = logits(weights, CONFIG, said.token_ids).log_softmax(-1)[:-1]
    assert said.token_ids[-ANSWER:] == expected[-ANSWER:].argmax(-1).tolist()
    by_reference = expected.gather(1, torch.tensor(said.token_ids[1:])[:, None])[:, 0]
    assert by_reference.std() > 1
    torch.testing.assert_close(torch.tensor(said.logprobs), by_reference, atol=1e-2, rtol=0)
    assert said.chat.text == said.completion != ""
    assert not (source / "ran").exists()
