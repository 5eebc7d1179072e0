"""The shorter ways on a CPU give what vLLM's own give."""

from functools import partial

import psutil
import pytest
import torch
from vllm.config import CompilationMode, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.platforms import current_platform
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

from qwen_vllm.vllm_plugin import cpu_speedups, int8_copy
from qwen_vllm.vllm_plugin.cpu_speedups import CANDIDATES

VOCABULARY = 1000


@pytest.fixture(autouse=True)
def engine() -> object:
    """What a layer finds while an engine is made."""
    current_platform.import_kernels()
    cpu_speedups.register()
    with set_current_vllm_config(config(CompilationMode.NONE)):
        yield


def config(mode: CompilationMode) -> VllmConfig:
    made = VllmConfig()
    made.compilation_config.mode = mode
    return made


def by_sorting(logits: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor | None) -> torch.Tensor:
    return apply_top_k_top_p_pytorch(logits, k, p, allow_cpu_sync=True)


def rows(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 30.0], ids=["all alike", "flat", "usual", "one alone"])
@pytest.mark.parametrize(
    "k",
    [
        None,
        rows(1, 20, CANDIDATES, CANDIDATES + 1, 900, VOCABULARY, 20, 1, dtype=torch.int32),
    ],
    ids=["top-p alone", "top-k too"],
)
def test_the_same_tokens_are_left_as_by_sorting(spread: float, k: torch.Tensor | None) -> None:
    chance = torch.Generator().manual_seed(1)
    p = rows(0.9, 0.9, 0.95, 0.5, 0.999, 1.0, 1.0, 0.01)
    for _ in range(5):
        logits = torch.randn(len(p), VOCABULARY, generator=chance) * spread + torch.randperm(VOCABULARY) * 1e-6
        expected = by_sorting(logits.clone(), None if k is None else k.clone(), p)
        seen = cpu_speedups.without_sorting(by_sorting)(logits.clone(), None if k is None else k.clone(), p)
        torch.testing.assert_close(seen.softmax(-1), expected.softmax(-1), rtol=0, atol=1e-5)
        kept = seen.isfinite()
        assert torch.equal(seen[kept], logits[kept])


def test_rows_are_sorted_only_where_the_likeliest_do_not_suffice() -> None:
    sorted_rows = []

    def count(logits: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor) -> torch.Tensor:
        sorted_rows.append(len(logits))
        return by_sorting(logits, k, p)

    steep = torch.arange(VOCABULARY).float()
    cpu_speedups.without_sorting(count)(torch.stack([steep, steep]), None, rows(0.9, 1.0))
    assert sorted_rows == []
    cpu_speedups.without_sorting(count)(torch.stack([steep, steep * 0]), None, rows(0.9, 0.9))
    assert sorted_rows == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("wider", [0, 32], ids=["", "a part of wider rows"])
def test_norms_and_activations_are_as_without_their_kernels(dtype: torch.dtype, tokens: int, wider: int) -> None:
    norm, activation = RMSNorm(64, dtype=dtype), SiluAndMul()
    assert type(norm) is cpu_speedups.OneKernelRMSNorm
    assert type(activation) is cpu_speedups.OneKernelSiluAndMul
    norm.weight.data.normal_()
    x, residual = torch.randn(2, tokens, 64 + wider, dtype=dtype)[..., :64]
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(activation.forward_cpu(x), activation.forward_native(x), **tolerance)
    torch.testing.assert_close(norm.forward_cpu(x), norm.forward_native(x.clone()), **tolerance)
    expected, sums = norm.forward_native(x.clone(), residual.clone())
    seen, kept = norm.forward_cpu(x, residual)
    torch.testing.assert_close(seen, expected, **tolerance)
    torch.testing.assert_close(kept, sums, **tolerance)


def test_a_norm_of_a_part_of_its_input_stays_vllms() -> None:
    norm, x = RMSNorm(64, var_hidden_size=32), torch.randn(3, 64)
    torch.testing.assert_close(norm.forward_cpu(x), norm.forward_native(x))


def linear(dtype: torch.dtype, outputs: int = 48, inputs: int = 64) -> torch.nn.Module:
    return torch.nn.Linear(inputs, outputs, dtype=dtype).requires_grad_(False)


def test_float32_weights_are_held_in_16_bits() -> None:
    layer, x = linear(torch.float32), torch.randn(5, 64)
    weight, expected = layer.weight, layer(x)
    cpu_speedups.hold_in_16_bits(dispatch_cpu_unquantized_gemm)(layer, True)
    assert layer.weight.numel() == 0
    seen = layer.cpu_linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(seen, expected, rtol=1e-3, atol=1e-3)
    rounded = (x.double() @ weight.half().double().T).float()
    torch.testing.assert_close(layer.cpu_linear(x, layer.weight, None), rounded)


def test_other_weights_stay_vllms() -> None:
    taken = []
    choose = cpu_speedups.hold_in_16_bits(lambda layer, remove_weight: taken.append(layer))
    with set_current_vllm_config(config(CompilationMode.DYNAMO_TRACE_ONCE)):
        choose(linear(torch.float32), True)
    choose(linear(torch.bfloat16), True)
    assert len(taken) == 2


def test_no_copy_is_made_of_a_compiled_model() -> None:
    layer = linear(torch.bfloat16)
    with set_current_vllm_config(config(CompilationMode.DYNAMO_TRACE_ONCE)):
        int8_copy.LinearWithCopy().process_weights_after_loading(layer)
    assert "_add_copy" not in layer.cpu_linear.__qualname__


def test_the_cache_takes_memory_as_it_is_filled() -> None:
    before = psutil.Process().memory_info().rss
    allocate = partial(torch.zeros, dtype=torch.int8, device="cpu")
    cache = cpu_speedups.filled_on_demand(allocate)(2**30)
    assert psutil.Process().memory_info().rss - before < 2**28
    assert (cache.shape, cache.dtype) == ((2**30,), torch.int8)
    cache[12345] = 7
    assert int(cache[:20000].sum()) == 7
    assert torch.zeros(3, dtype=torch.int8).tolist() == [0, 0, 0]


@pytest.mark.parametrize("method", [int8_copy.LinearWithCopy, int8_copy.HeadWithCopy])
def test_few_tokens_are_computed_with_a_copy_in_4_bits_where_that_loses_nothing(method: type) -> None:
    layer = linear(torch.bfloat16)
    steps = torch.randint(16, (*layer.weight.shape[:1], layer.weight.shape[1] // 32, 32)).float()
    steps[..., 0], steps[..., 1] = 0, 15
    groups = (steps - 7) * torch.rand_like(steps[..., :1])
    layer.weight.data.copy_(groups.flatten(1))
    weight, bias = layer.weight.data.clone(), layer.bias
    method().process_weights_after_loading(layer)
    x = torch.randn(int8_copy.FEW, 64, dtype=torch.bfloat16)
    expected = x.double() @ weight.double().T
    error = layer.cpu_linear(x, layer.weight, None).double() - expected
    assert error.norm() < 0.004 * expected.norm()  # in 8 bits it is over 0.0044
    assert (layer.cpu_linear(x, layer.weight, bias) - bias - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("outputs", [48, 64])
@pytest.mark.parametrize("method", [int8_copy.LinearWithCopy, int8_copy.HeadWithCopy])
def test_few_tokens_are_computed_with_a_copy_in_8_bits(method: type, outputs: int) -> None:
    layer = linear(torch.bfloat16, outputs)
    layer.weight[3] = 0
    weight, bias = layer.weight.data.clone(), layer.bias
    method().process_weights_after_loading(layer)
    for tokens in (1, int8_copy.FEW, int8_copy.FEW + 1):
        x = torch.randn(tokens, 64, dtype=torch.bfloat16)
        expected = x.float() @ weight.float().T + bias.float()
        seen = layer.cpu_linear(x, layer.weight, bias).float()
        assert (seen - expected).abs().max() < 0.02 * expected.abs().max()
        torch.testing.assert_close(layer.cpu_linear(x, layer.weight, None)[:, 3].float(), torch.zeros(tokens))
