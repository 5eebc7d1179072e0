"""LoRA adapters: which of them a model can take, and a repair of how vLLM's CPU build computes with them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    import torch

SIDES = re.compile(r"\blayers\.(\d+)\..*(?:([qkv]|gate|up)_proj\.lora_A|(o|down)_proj\.lora_B)\b")
"""The matrices of an adapter with a side as long as the model's hidden state: its second, or else its first."""


def check(folder: Path, config: Mapping[str, Any], args: Any) -> None:
    """Whether the folder holds an adapter, as peft writes them, for a model of this config.

    Args:
        config: of the model, or of its part for text.
        args: `max_lora_rank`.

    Raises:
        ValueError: it does not; the message says why.
    """
    from vllm.lora.peft_helper import PEFTHelper

    if not folder.is_dir():
        raise ValueError("there is no such folder")
    try:
        PEFTHelper.from_local_dir(str(folder), None).validate_legal(args)
        # A .bin cannot be looked at without loading it.
        if not (folder / "adapter_model.bin").is_file():
            _check_shapes(folder / "adapter_model.safetensors", config)
    except FileNotFoundError:
        raise ValueError("it holds no LoRA adapter as peft writes them") from None
    except (ValueError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(str(error).replace("max_lora_rank", "--max-lora-rank")) from None


def _check_shapes(file: Path, config: Mapping[str, Any]) -> None:
    """Whether the matrices that read or write the hidden state have its size."""
    hidden, layers = config.get("hidden_size"), config.get("num_hidden_layers")
    with safe_open(file, framework="numpy") as tensors:
        for key in tensors.keys():  # noqa: SIM118
            found = SIDES.search(key)
            if not (found and hidden and layers):
                continue
            layer, reads, _ = found.groups()
            size = tensors.get_slice(key).get_shape()[1 if reads else 0]
            if int(layer) >= layers or size != hidden:
                raise ValueError(
                    f"it is for another model: its layer {layer} has a hidden size of {size}; this model has {layers} "
                    f"layers, with {hidden}"
                )


def repair() -> None:
    """Keeps adapters off the requests that name none. On a CPU vLLM 0.32 gives them slot -1, which torch takes for the
    last one: the model itself would answer with an adapter that another request of the same step asks for.
    """
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    shrink = lora_ops.bgmv_shrink

    def shrink_own(
        inputs: "torch.Tensor",
        weights: "torch.Tensor",
        outputs: "torch.Tensor",
        slots: "torch.Tensor",
        scaling: float = 1.0,
    ) -> None:
        shrink(inputs, weights, outputs, slots, scaling)
        outputs[slots < 0] = 0

    lora_ops.bgmv_shrink = punica_cpu.bgmv_shrink = shrink_own
