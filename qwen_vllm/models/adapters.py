"""LoRA adapters: which of them a model can take."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qwen_vllm.models.checks import ModelArgs, ModelUnavailable, read_config, refuse_pointer
from qwen_vllm.words import say

SIDES = re.compile(r"\blayers\.(\d+)\..*(?:([qkv]|gate|up)_proj\.lora_A|(o|down)_proj\.lora_B)\b")
"""Matches LoRA matrices with a dimension of `hidden_size`: dim 1 of lora_A (q, k, v, gate, up), dim 0 of lora_B (o,
down)."""


def check_adapters(adapters: Mapping[str, str], args: ModelArgs) -> None:
    """Refuse adapters that vLLM would refuse after it has loaded the model, and those for a model of another size.

    vLLM takes an adapter whose matrices are smaller than the model's, and answers nonsense.

    Args:
        adapters: their folders by their names.
        args: also has `max_lora_rank`.

    Raises:
        ModelUnavailable: naming the adapter.
    """
    config = read_config(args.model)
    for name, folder in adapters.items():
        try:
            check_adapter(Path(folder), config.get("text_config") or config, args)
        except ValueError as reason:
            raise ModelUnavailable(
                "the LoRA adapter {name} cannot be used: {folder}: {reason}", name=name, folder=folder, reason=reason
            ) from None


def check_adapter(folder: Path, config: Mapping[str, Any], args: Any) -> None:
    """Raise a ValueError that says why, unless the folder holds an adapter, as peft writes them, for this config."""
    from vllm.lora.peft_helper import PEFTHelper

    if not folder.is_dir():
        raise ValueError(say("there is no such folder"))
    for file in folder.glob("adapter_*"):
        refuse_pointer(file)
    try:
        PEFTHelper.from_local_dir(str(folder), None).validate_legal(args)
        # A .bin cannot be looked at without loading it.
        if not (folder / "adapter_model.bin").is_file():
            _check_shapes(folder / "adapter_model.safetensors", config)
    except FileNotFoundError:
        raise ValueError(say("it holds no LoRA adapter as peft writes them")) from None
    except (ValueError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(str(error).replace("max_lora_rank", "--max-lora-rank")) from None


def _check_shapes(file: Path, config: Mapping[str, Any]) -> None:
    """Check that the matrices that read or write the hidden state have its size."""
    hidden, layers = config.get("hidden_size"), config.get("num_hidden_layers")
    with safe_open(file, framework="numpy") as tensors:
        for key in tensors.keys():  # noqa: SIM118
            found = SIDES.search(key)
            if not (found and hidden and layers):
                continue
            layer, reads, _ = found.groups()
            size = tensors.get_slice(key).get_shape()[1 if reads else 0]
            if int(layer) >= layers or size != hidden:
                told = say(
                    "it is for another model: its layer {layer} has a hidden size of {size}; this model has {layers} "
                    "layers, with {hidden}",
                    layer=layer,
                    size=size,
                    layers=layers,
                    hidden=hidden,
                )
                raise ValueError(told)
