"""A token id behind the tokenizer's last: a model's matrices are padded, and sampling can draw such a row."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from qwen_vllm.protocol import ChatResult, Part, Sampling
from tests.support.tiny_reciter import write_reciter
from vllm_wrapper import ChatModel

pytestmark = pytest.mark.long
PADDED = range(151665, 151936)
"""The ids of Qwen2.5 that stand for nothing."""
TEXT = "Hello 朋友👩‍🚀 there!"
GREEDY = Sampling(temperature=0, repetition_penalty=1)


def say(folder: Path) -> tuple[list[Part], list[ChatResult]]:
    """What the model says, streamed, and in a batch; runs in a process of its own."""
    model = ChatModel(str(folder))
    rows = [{"query": "?"}, {"query": "?", "max_tokens": 2}, {"query": "?", "stop": ["there"]}]
    return list(model.stream_chat("?", sampling=GREEDY)), model.chat_batch(rows, GREEDY)


def test_a_padded_id_has_no_text_and_harms_nothing(tmp_path: Path, qwen_tokenizer: PreTrainedTokenizerBase) -> None:
    said = [*qwen_tokenizer.encode(TEXT), qwen_tokenizer.eos_token_id]
    padded = [token for pair in zip(PADDED, said, strict=False) for token in pair]
    padded[0] = PADDED[-1]
    write_reciter(tmp_path / "Padded", qwen_tokenizer, [*qwen_tokenizer.encode("\n"), *padded], vocab_size=151936)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        (*pieces, streamed), (whole, short, stopped) = process.submit(say, tmp_path / "Padded").result()
    assert "".join(map(str, pieces)) == streamed.text == whole.text == TEXT
    assert streamed.completion_tokens == whole.completion_tokens == len(padded)
    assert (whole.finish_reason, stopped.text, stopped.stop_reason) == ("stop", TEXT.partition("there")[0], "there")
    assert (short.text, short.finish_reason) == ("Hello", "length")
