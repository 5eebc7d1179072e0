"""A copy of the weights in 8 bits, with which few tokens are computed: one stream waits for its weights to be read.

`--quantization int8_copy` asks for it, on a CPU with AVX-512 that computes in bfloat16. Each row of a weight has a
scale, the inputs stay as they are, and torch has the kernel. More tokens at once (several streams, prompts) are
computed with the weights as they were loaded. How far the answers differ is in docs/speed.md.
"""

from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

from qwen_vllm.hardware import INT8_COPY
from qwen_vllm.vllm_plugin.cpu_speedups import is_compiled

FEW = 3
"""Tokens at once up to which the copy is faster; see benchmarks/NOTES.md."""


def _add_copy(layer: torch.nn.Module, weight: torch.Tensor) -> None:
    """Let a layer that computes with `weight`, [outputs, inputs], take few tokens with a copy in int8."""
    if is_compiled():
        return
    scales = (weight.abs().amax(1).float().clamp_min(1e-30) / 127).to(weight.dtype)
    copy = (weight.float() / scales.float().unsqueeze(1)).round().clamp(-127, 127).to(torch.int8)
    many = layer.cpu_linear

    def linear(x: torch.Tensor, loaded: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if len(x) > FEW:
            product: torch.Tensor = many(x, loaded, bias)
            return product
        product = torch.ops.aten._weight_int8pack_mm(x.contiguous(), copy, scales)
        return product if bias is None else product.add_(bias)

    layer.cpu_linear = linear


class LinearWithCopy(UnquantizedLinearMethod):
    """A linear layer."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Take the loaded weight."""
        weight = layer.weight.data
        super().process_weights_after_loading(layer)
        _add_copy(layer, weight)


class HeadWithCopy(UnquantizedEmbeddingMethod):
    """The layer that gives the logits."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Take the loaded weight."""
        super().process_weights_after_loading(layer)
        _add_copy(layer, layer.weight.data)


class Int8Copy(QuantizationConfig):
    """What vLLM asks of a way to quantize."""

    def get_name(self) -> str:
        """Return the name on the command line."""
        return INT8_COPY

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
    def from_config(cls, config: dict[str, Any]) -> "Int8Copy":
        """Make it; there is nothing to set."""
        return cls()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Choose what loads a layer; None: vLLM's own way."""
        if isinstance(layer, ParallelLMHead):
            return HeadWithCopy()
        return LinearWithCopy() if isinstance(layer, LinearBase) else None


def register() -> None:
    """Let vLLM know the name."""
    register_quantization_config(INT8_COPY)(Int8Copy)
