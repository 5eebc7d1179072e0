"""A copy of the weights in few bits, with which few tokens are computed: one stream waits for its weights to be read.

`--quantization int8_copy` asks for it, on a CPU with AVX-512 that computes in bfloat16. Weights that came in 4 bits, as
the demo model's, get a copy in 4 bits, which loses nothing; others one in 8 bits, with a scale for each row. More
tokens at once (several streams, prompts) are computed with the weights as they were loaded. How far the answers differ
is in docs/speed.md.
"""

from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.utils import check_cpu_sgl_kernel
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

from qwen_vllm.hardware import INT8_COPY
from qwen_vllm.vllm_plugin.cpu_speedups import is_compiled

Product = Callable[[torch.Tensor], torch.Tensor]
"""From inputs, [tokens, inputs], to outputs, [tokens, outputs]."""
FEW = 4
"""Tokens at once up to which a copy is faster; see benchmarks/NOTES.md."""
GROUP = 32
"""So many weights of a row share a step and an offset in the 4 bits of GGUF's Q4_1."""
FOUR_BITS = 0.1
"""How far, in steps, weights may be from multiples of their step: bfloat16 moves the demo model's by 0.04."""


def _in_steps(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Return `weight` by its groups, as steps from 0 to 15, size of a step and least value; None where it has more."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    least, most = groups.aminmax(dim=-1, keepdim=True)
    step = ((most - least) / 15).clamp_min_(1e-30)
    exact = groups.sub_(least).div_(step)
    steps = exact.round()
    return None if exact.sub_(steps).abs_().max() > FOUR_BITS else (steps, step, least)


def _in_4_bits(weight: torch.Tensor) -> Product | None:
    """Return the product with `weight`, [outputs, inputs], as 4 bits; None where it has more."""
    # Of a weight that has more, the first row tells at once.
    if weight.shape[1] % GROUP or not _in_steps(weight[:1]) or not (found := _in_steps(weight)):
        return None
    steps, step, least = found
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(steps.int().flatten(1), 1)
    # The kernel counts the steps from 8.
    scales = torch.cat((step, least + 8 * step), dim=-1).transpose(0, 1).to(weight.dtype).contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, scales)


def _in_8_bits(weight: torch.Tensor) -> Product:
    """Return the product with `weight`, [outputs, inputs], as 8 bits."""
    scales = weight.abs().amax(1).float().clamp_min_(1e-30) / 127
    copy = (weight.float() / scales.unsqueeze(1)).round_().clamp_(-127, 127).to(torch.int8)
    if weight.shape[0] % 32 or not check_cpu_sgl_kernel(*weight.shape, torch.int8):
        rounded = scales.to(weight.dtype)
        return lambda x: torch.ops.aten._weight_int8pack_mm(x, copy, rounded)
    packed = torch.ops._C.convert_weight_packed(copy)

    def product(x: torch.Tensor) -> torch.Tensor:
        # This kernel rounds its inputs to 8 bits too. What that leaves of them goes along as rows of its own.
        steps, step = torch.empty_like(x, dtype=torch.int8), torch.empty(len(x), 1)
        torch.ops._C.dynamic_scaled_int8_quant(steps, x, step, None)
        rows = torch.cat((x, x - steps * step)).to(x.dtype)
        most, rest = torch.ops._C.int8_scaled_mm_with_quant(rows, packed, scales, None, x.dtype, True).chunk(2)
        return most.add_(rest)

    return product


def product_with_copy(weight: torch.Tensor) -> Product:
    """Return the product with a copy of `weight`, [outputs, inputs]: in 4 bits where it has no more, else in 8."""
    return _in_4_bits(weight) or _in_8_bits(weight)


def _add_copy(layer: torch.nn.Module, weight: torch.Tensor) -> None:
    """Let a layer that computes with `weight`, [outputs, inputs], take few tokens with a copy."""
    if is_compiled():
        return
    many = layer.cpu_linear
    few = product_with_copy(weight)

    def linear(x: torch.Tensor, loaded: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if len(x) > FEW:
            product: torch.Tensor = many(x, loaded, bias)
            return product
        product = few(x.contiguous())
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
