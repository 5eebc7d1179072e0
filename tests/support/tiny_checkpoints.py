"""Tiny checkpoints with random weights and Qwen's real vocabulary: a Qwen2, a LoRA adapter for it, a Qwen2.5-VL."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.support.tokenizers import VISION_TOKENS, qwen_tokenizer

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 151936,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,  # large enough that every part shows in the answers
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
PROJECTIONS = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
SCALE = 2.0

# The part of Qwen2.5-VL's own template that deals with texts and images.
VISION_TEMPLATE = """\
{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {%- for content in message['content'] %}
            {%- if content['type'] == 'image' or 'image' in content or 'image_url' in content %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif 'text' in content %}
                {{- content['text'] }}
            {%- endif %}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def write_text_model(folder: Path, **config: Any) -> Path:
    """A Qwen2; `config` goes over TEXT."""
    return _write(folder, Qwen2ForCausalLM, Qwen2Config(**{**TEXT, **config}), qwen_tokenizer())


def write_vision_model(folder: Path) -> Path:
    """A Qwen2.5-VL, which takes images."""
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": TEXT["hidden_size"],
        "fullatt_block_indexes": [1],
        "initializer_range": 0.2,
    }
    rotary = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6}
    tokenizer = qwen_tokenizer(VISION_TEMPLATE, *VISION_TOKENS)
    start, end, _, image, video = tokenizer.convert_tokens_to_ids(VISION_TOKENS[-5:])
    tokens = {"vision_start_token_id": start, "vision_end_token_id": end, "image_token_id": image}
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rotary}, vision_config=vision, video_token_id=video, **tokens
    )
    _write(folder, Qwen2_5_VLForConditionalGeneration, config, tokenizer)
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def _write(folder: Path, kind: type[PreTrainedModel], config: Any, tokenizer: PreTrainedTokenizerBase) -> Path:
    torch.manual_seed(1)
    kind(config).save_pretrained(folder)
    GenerationConfig(eos_token_id=[151645, 151643]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_adapter(folder: Path, seed: int = 2, rank: int = 4, **config: Any) -> Path:
    """A LoRA adapter of all projections as peft writes them, for the model of `write_text_model(**config)`."""
    folder.mkdir()
    random = torch.Generator().manual_seed(seed)
    shape = {**TEXT, **config}
    weights = Qwen2ForCausalLM(Qwen2Config(**{**shape, "vocab_size": 8, "bos_token_id": 0, "eos_token_id": 0}))
    tensors = {}
    for name, matrix in weights.named_parameters():
        module = name.removesuffix(".weight")
        if module.endswith(tuple(PROJECTIONS)) and name.endswith(".weight"):
            rows, columns = matrix.shape
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, columns, generator=random) / 4
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, rank, generator=random) / 4
    save_file(tensors, folder / "adapter_model.safetensors")
    described = {
        "peft_type": "LORA",
        "base_model_name_or_path": "Qwen/Qwen-Tiny",
        "r": rank,
        "lora_alpha": SCALE * rank,
        "target_modules": [projection.partition(".")[2] for projection in PROJECTIONS],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return folder


def write_merged(folder: Path, model: Path, adapter: Path) -> Path:
    """The model with the adapter in its weights: W + scale · B · A."""
    folder.mkdir()
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).symlink_to(file)
    weights, low_rank = load_file(model / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name, a in low_rank.items():
        if ".lora_A." in name:
            target = name.removeprefix("base_model.model.").replace(".lora_A", "")
            weights[target] += SCALE * low_rank[name.replace(".lora_A", ".lora_B")] @ a
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_model(folder: Path, **config: Any) -> Path:
    """The files of a model as far as they are looked at before it is loaded; `config` goes into its config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["Qwen2ForCausalLM"], **config}))
    (folder / "tokenizer.json").write_text("{}")
    save_file({"weight": torch.zeros(100)}, folder / "model.safetensors")
    return folder
