"""Weights of 8 bits on a CPU with AMX: made while the model is loaded, and computed with by vLLM's own kernel.

`--quantization int8_on_load` asks for it. Each row of a weight has a scale, and so has each token's input: what the
kernel computes is the product of two int8 matrices. How far the answers differ is in docs/speed.md.
"""

from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.utils import check_cpu_sgl_kernel
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

from qwen_vllm.hardware import INT8_ON_LOAD


def _hold_in_8_bits(layer: torch.nn.Module) -> bool:
    """Let a layer compute with its weight, [outputs, inputs], in int8; False where the kernel takes no such shape."""
    weight = layer.weight.data
    if not check_cpu_sgl_kernel(*weight.shape, torch.int8):
        return False
    scales = weight.float().abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    packed = torch.ops._C.convert_weight_packed((weight / scales.unsqueeze(1)).round().to(torch.int8))
    multiply = torch.ops._C.int8_scaled_mm_with_quant

    def linear(x: torch.Tensor, _: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return multiply(x, packed, scales, None if bias is None else bias.float(), x.dtype, True)

    layer.cpu_linear = linear
    return True


class Int8Linear(UnquantizedLinearMethod):
    """A linear layer that is loaded as it was written."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Take the loaded weight."""
        if _hold_in_8_bits(layer):
            layer.weight = torch.nn.Parameter(layer.weight.new_empty(0), requires_grad=False)
        else:
            super().process_weights_after_loading(layer)


class Int8Head(UnquantizedEmbeddingMethod):
    """The layer that gives the logits; its weight may be the embeddings' too, and stays."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Take the loaded weight."""
        if not _hold_in_8_bits(layer):
            super().process_weights_after_loading(layer)


class Int8OnLoad(QuantizationConfig):
    """What vLLM asks of a way to quantize."""

    def get_name(self) -> str:
        """Return the name on the command line."""
        return INT8_ON_LOAD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes that a layer's input may have."""
        return [torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the least capability of a GPU, which is not asked for on a CPU."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return the files to read beside the model: none."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Int8OnLoad":
        """Make it; there is nothing to set."""
        return cls()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Choose what loads a layer; None: vLLM's own way."""
        if isinstance(layer, ParallelLMHead):
            return Int8Head()
        return Int8Linear() if isinstance(layer, LinearBase) else None


def register() -> None:
    """Let vLLM know the name."""
    register_quantization_config(INT8_ON_LOAD)(Int8OnLoad)
