"""Speed on a CPU for vLLM 0.32; `patches.py` lists and applies what is here. benchmarks/NOTES.md has the figures.

1. Weights are held in 16 bits where the processor computes in float32: a token needs each weight once, and reading them
   from memory is most of its time.
2. Norms and activations are one kernel each, vLLM's own, instead of a dozen operators.
3. Top-p looks at the likeliest tokens instead of sorting the vocabulary.
4. The KV cache takes memory as it is filled.
5. A pipeline works without compiling, which takes minutes.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed import get_pp_group
from vllm.model_executor.custom_op import CustomOp, op_registry_oot
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm

CANDIDATES = 128
"""Top-p nearly always ends among so many of the likeliest tokens; where it does not, the row is sorted."""
INFINITE = float("inf")
_PACKERS = ThreadPoolExecutor()
"""Packing takes half of a load. Each weight takes one core, and a layer is first needed at the first request."""


def is_compiled() -> bool:
    """Tell whether the model that is being loaded will be compiled: then its layers stay as vLLM makes them."""
    config = get_current_vllm_config_or_none()
    return bool(config and config.compilation_config.mode)


def hold_in_16_bits(dispatch: Callable[..., None]) -> Callable[..., None]:
    """Wrap vLLM's choice of a kernel for a linear layer: float32 weights are held as float16 and computed in float32.

    FBGEMM's kernel does that on any x86 processor with AVX2. Float16 rounds an eighth as much as bfloat16, in which the
    weights of most models come; numbers beyond its range are clipped, with a warning of torch.
    """

    def choose(layer: torch.nn.Module, remove_weight: bool) -> None:
        weight = layer.weight
        takes = weight.dtype == torch.float32 and weight.ndim == 2 and not weight.is_meta
        if is_compiled() or not takes or torch.backends.quantized.engine not in ("x86", "fbgemm"):
            return dispatch(layer, remove_weight)
        packing = _PACKERS.submit(torch.ops.quantized.linear_prepack_fp16, weight.data, None)
        multiply = torch.ops.quantized.linear_dynamic_fp16

        def first(*args: Any) -> torch.Tensor:
            packed = packing.result()

            def linear(x: torch.Tensor, _: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
                product = multiply(x, packed)
                return product if bias is None else product.add_(bias)

            layer.cpu_linear = linear
            return linear(*args)

        layer.cpu_linear = first
        if remove_weight:
            layer.weight = torch.nn.Parameter(weight.new_empty(0), requires_grad=False)

    return choose


class OneKernelRMSNorm(RMSNorm):
    """vLLM's norm by its kernel for CPUs."""

    def forward_cpu(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Normalize `x`, [tokens, size], with vLLM's contract: a residual is added before, in place."""
        if not self.has_weight or self.variance_size_override or self.weight.dtype != x.dtype:
            return self.forward_native(x, residual)
        if residual is None:
            # The kernel knows no strides, and the queries and keys of a head are a part of wider rows.
            normed = torch.empty_like(x, memory_format=torch.contiguous_format)
            torch.ops._C.rms_norm(normed, x.contiguous(), self.weight, self.variance_epsilon)
            return normed
        if not (x.is_contiguous() and residual.is_contiguous()):
            return self.forward_native(x, residual)
        torch.ops._C.fused_add_rms_norm(x, residual, self.weight, self.variance_epsilon)
        return x, residual


class OneKernelSiluAndMul(SiluAndMul):
    """vLLM's activation by its kernel for CPUs."""

    def forward_cpu(self, x: torch.Tensor) -> torch.Tensor:
        """Return silu(left half) * right half of `x`, [tokens, 2 * size]."""
        out = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype)
        torch.ops._C.silu_and_mul(out, x.contiguous())
        return out


def without_sorting(by_sorting: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap vLLM's top-k and top-p: what is kept is the same, but for tokens as likely as the last one kept."""

    def apply_top_k_top_p(logits: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor | None) -> torch.Tensor:
        if p is None:
            return by_sorting(logits, k, p)
        rows, vocabulary = logits.shape
        limit = torch.full((rows,), vocabulary) if k is None else k
        best, tokens = logits.topk(min(CANDIDATES, vocabulary), dim=-1)
        among = torch.arange(best.shape[1]) < limit.unsqueeze(1)
        few, unlimited = limit <= best.shape[1], limit >= vocabulary
        probability = logits.softmax(-1).gather(1, tokens).masked_fill_(~among, 0)
        probability = torch.where(few.unsqueeze(1), probability / probability.sum(-1, keepdim=True), probability)
        likelier = probability.cumsum(-1) - probability
        kept = among & (likelier < p.unsqueeze(1))
        kept[:, 0] = True
        least = best.masked_fill(~kept, INFINITE).amin(-1)
        whole = unlimited & (p >= 1)
        unsure = ~few & ~whole & (kept[:, -1] | ~unlimited)
        least.masked_fill_(whole | unsure, -INFINITE)
        if unsure.any():
            logits[unsure] = by_sorting(logits[unsure], None if k is None else k[unsure], p[unsure])
        return logits.masked_fill_(logits < least.unsqueeze(1), -INFINITE)

    return apply_top_k_top_p


class _ZerosOnDemand(TorchFunctionMode):
    """Takes zeros as the system gives them: memory that is not there before it is written."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), options: Any = None) -> Any:
        if function is torch.zeros and (options or {}).get("dtype") is torch.int8:
            return torch.from_numpy(np.zeros(args[0], np.int8))
        return function(*args, **(options or {}))


def filled_on_demand(allocate: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap vLLM's allocation of the KV cache."""

    def allocate_kv_cache(*args: Any, **options: Any) -> Any:
        with _ZerosOnDemand():
            return allocate(*args, **options)

    return allocate_kv_cache


def with_room_between_stages(load: Callable[..., None]) -> Callable[..., None]:
    """Wrap vLLM's loading of a model: a later stage of a pipeline gets room for what it is handed."""

    def load_model(runner: Any, *args: Any, **options: Any) -> None:
        load(runner, *args, **options)
        if not get_pp_group().is_first_rank:
            room = runner.model.make_empty_intermediate_tensors
            runner.intermediate_tensors = room(runner.max_num_tokens, runner.model_config.dtype, runner.device)

    return load_model


def register() -> None:
    """Let vLLM make these norms and activations instead of its own."""
    for ours in (OneKernelRMSNorm, OneKernelSiluAndMul):
        theirs = ours.__mro__[1].__name__
        if theirs not in op_registry_oot:
            CustomOp.register_oot(ours, name=theirs)
