"""Tiny checkpoints with random weights: a Qwen2, a LoRA adapter for it, a Qwen2.5-VL, a Qwen3.5; others in 4 bits."""

import json
import shutil
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
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from tests.support.tiny_families import GATED_DELTA_NET, TINY
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
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123\n"
"""What Git LFS leaves in place of a file that it has not fetched."""

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
    return _write_processor(folder, "Qwen2_5_VLProcessor", min_pixels=3136, max_pixels=12845056, patch_size=14)


def write_qwen35(folder: Path, template: str = VISION_TEMPLATE) -> Path:
    """A Qwen3.5 as it is published, with its vision tower."""
    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "initializer_range": 0.2}
    tokenizer = qwen_tokenizer(template, *VISION_TOKENS)
    start, end, _, image, video = tokenizer.convert_tokens_to_ids(VISION_TOKENS[-5:])
    text = {**TINY, **GATED_DELTA_NET, "vocab_size": len(tokenizer), "max_position_embeddings": 2048}
    config = Qwen3_5Config(
        text_config={**text, "eos_token_id": tokenizer.eos_token_id},
        vision_config={**vision, "out_hidden_size": text["hidden_size"]},
        vision_start_token_id=start,
        vision_end_token_id=end,
        image_token_id=image,
        video_token_id=video,
    )
    _write(folder, Qwen3_5ForConditionalGeneration, config, tokenizer)
    return _write_processor(
        folder, "Qwen3VLProcessor", size={"shortest_edge": 65536, "longest_edge": 16777216}, patch_size=16
    )


def _write_processor(folder: Path, name: str, **config: Any) -> Path:
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": name,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        **config,
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
    (folder / "config.json").write_text(
        json.dumps({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **config})
    )
    (folder / "tokenizer.json").write_text("{}")
    save_file({"weight": torch.zeros(100)}, folder / "model.safetensors")
    return folder


def write_quantized(source: Path, folder: Path, method: str, group: int = 128) -> Path:
    """The checkpoint `source` with its layers in 4 bits, as AutoGPTQ ("gptq") or AutoAWQ ("awq") write them, in
    `folder`. `source` itself gets the weights that those bits stand for, so that both are the same network.
    """
    shutil.copytree(source, folder)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": group} | (
        {"sym": True, "desc_act": False} if method == "gptq" else {"zero_point": True, "version": "gemm"}
    )
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    weights, quantized = load_file(source / "model.safetensors"), {}
    for name, weight in weights.items():
        if not name.endswith("_proj.weight"):
            quantized[name] = weight
            continue
        groups = weight.float().T.reshape(-1, group, len(weight))
        scales = (groups.abs().amax(1) / 7).half()
        codes = (groups / scales[:, None]).round() + 8
        weights[name] = ((codes - 8) * scales[:, None]).flatten(0, 1).T.to(weight.dtype).contiguous()
        codes, layer = codes.flatten(0, 1).to(torch.int32), name.removesuffix(".weight")
        quantized[f"{layer}.scales"] = scales
        if method == "gptq":
            # Eight rows a number, and the zero point of 8 less one.
            quantized[f"{layer}.qweight"] = _packed(codes.T).T.contiguous()
            quantized[f"{layer}.qzeros"] = _packed(torch.full(scales.shape, 7))
            quantized[f"{layer}.g_idx"] = torch.arange(len(codes), dtype=torch.int32) // group
        else:
            # Eight columns a number, in the order that AutoAWQ's kernels want.
            order = [0, 2, 4, 6, 1, 3, 5, 7]
            quantized[f"{layer}.qweight"] = _packed(codes.unflatten(1, (-1, 8))[..., order].flatten(1))
            quantized[f"{layer}.qzeros"] = _packed(torch.full(scales.shape, 8))
    save_file(quantized, folder / "model.safetensors", {"format": "pt"})
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    return folder


def _packed(codes: torch.Tensor) -> torch.Tensor:
    """Eight neighbours of 4 bits in a number, the first in the lowest bits."""
    wide = codes.long().unflatten(1, (-1, 8)) << torch.arange(0, 32, 4)
    return wide.sum(-1).to(torch.int32)
