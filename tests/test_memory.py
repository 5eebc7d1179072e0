"""The memory of models, against the counts of transformers and vLLM, and published sizes; the docs have its tables."""

from contextlib import nullcontext
from math import ceil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from vllm.config import CacheConfig
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateDtypeCalculator, MambaStateShapeCalculator
from vllm.platforms.interface import Platform
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.core.kv_cache_utils import (
    get_kv_cache_config_from_groups,
    get_kv_cache_groups,
    get_max_concurrency_for_kv_cache_config,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, MambaSpec

from docs.memory import (
    BITS,
    HYBRID_MODELS,
    MODELS,
    Config,
    block_tokens,
    gdn_layers,
    request_bytes,
    state_bytes,
    table,
    token_bytes,
    tokens_that_fit,
    weight_bytes,
)

DOCS = Path(__file__).parents[1] / "docs"
ALL = MODELS | HYBRID_MODELS
BILLIONS = {
    "Qwen2.5-0.5B": 0.49,
    "Qwen2.5-1.5B": 1.54,
    "Qwen2.5-3B": 3.09,
    "Qwen2.5-7B": 7.61,
    "Qwen2.5-14B": 14.7,
    "Qwen2.5-32B": 32.5,
    "Qwen2.5-72B": 72.7,
    "Qwen3-Coder-30B-A3B": 30.5,
    "Qwen3-Next-80B, Qwen3-Coder-Next": 79.674391296,
}


@pytest.mark.parametrize("model", ALL)
def test_the_weights_are_those_of_the_network(model: str) -> None:
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**ALL[model]))
    assert weight_bytes(ALL[model], BITS["BF16"]) == 2 * network.num_parameters()


@pytest.mark.parametrize("model", BILLIONS)
def test_the_weights_are_as_many_as_published(model: str) -> None:
    weights = weight_bytes(ALL[model], BITS["BF16"]) / 2
    assert weights / 1e9 == pytest.approx(BILLIONS[model], rel=0.01)


def test_a_hybrid_model_in_4_bits_keeps_all_but_its_experts_in_16() -> None:
    """A published checkpoint has 24.4 GB, of which 1.6 are the MTP layer and 0.9 the vision tower."""
    model = HYBRID_MODELS["Qwen3.5, 3.6-35B-A3B"]
    assert weight_bytes(model, BITS["Int4"]) / 1e9 == pytest.approx(24.4 - 1.6 - 0.9, rel=0.02)


def test_what_fits_with_the_weights_fills_the_card() -> None:
    model, bits = MODELS["Qwen2.5-7B"], BITS["Int4"]
    tokens = tokens_that_fit(model, bits, 24)
    used = weight_bytes(model, bits) + tokens * token_bytes(model)
    assert 20.5e9 < used + token_bytes(model) <= 24e9 * 0.92
    assert tokens_that_fit(model, BITS["BF16"], 12) == 0


def test_what_fits_beside_the_state_of_8_requests_fills_the_card() -> None:
    model, bits = HYBRID_MODELS["Qwen3.5-9B"], BITS["BF16"]
    tokens = tokens_that_fit(model, bits, 24)
    used = weight_bytes(model, bits) + tokens * token_bytes(model) + 8 * request_bytes(model) + 1.5e9
    assert 24e9 * 0.92 - block_tokens(model) * token_bytes(model) < used <= 24e9 * 0.92
    assert tokens % block_tokens(model) == 0


class GpuBackend:
    """What vLLM's attention backends for GPUs say of their blocks."""

    @staticmethod
    def get_supported_kernel_block_sizes() -> list[MultipleOf]:
        return [MultipleOf(16)]

    @staticmethod
    def customize_spec(spec: FullAttentionSpec) -> FullAttentionSpec:
        return spec


def vllm_state(config: Config) -> tuple[Any, Any]:
    """The shapes and number formats of a request's state in a GDN layer, by vLLM's calculators."""
    shapes = MambaStateShapeCalculator.gated_delta_net_state_shape(
        1,
        config["linear_num_key_heads"],
        config["linear_num_value_heads"],
        config["linear_key_head_dim"],
        config["linear_value_head_dim"],
        config["linear_conv_kernel_dim"],
    )
    ssm = config.get("mamba_ssm_dtype", "auto")
    return shapes, MambaStateDtypeCalculator.gated_delta_net_state_dtype(torch.bfloat16, "auto", ssm)


def vllm_cache(config: Config) -> CacheConfig:
    """The settings of the KV cache on a GPU, after vLLM has made the blocks of both kinds of layers one size."""
    shapes, dtypes = vllm_state(config)
    network = SimpleNamespace(
        get_mamba_state_shape_from_config=lambda _: shapes, get_mamba_state_dtype_from_config=lambda _: dtypes
    )
    cache = CacheConfig(block_size=16, mamba_cache_mode="align")
    cache.kv_cache_layout = "LBNHC"
    model = SimpleNamespace(
        dtype=torch.bfloat16,
        use_mla=False,
        architecture="",
        get_num_kv_heads=lambda _: config["num_key_value_heads"],
        get_head_size=lambda: config["head_dim"],
    )
    settings = SimpleNamespace(cache_config=cache, model_config=model, parallel_config=None)
    with (
        patch("vllm.model_executor.models.ModelRegistry.resolve_model_cls", return_value=(network, "")),
        patch("vllm.config.vllm.set_current_vllm_config", return_value=nullcontext()),
        patch.object(Platform, "_find_non_ssm_backends", return_value=[GpuBackend]),
    ):
        Platform._align_hybrid_block_size(settings, GpuBackend)
    return cache


@pytest.mark.parametrize("model", HYBRID_MODELS)
def test_the_state_of_a_request_is_as_large_as_vllm_makes_it(model: str) -> None:
    shapes, dtypes = vllm_state(HYBRID_MODELS[model])
    assert state_bytes(HYBRID_MODELS[model]) == MambaSpec(shapes=shapes, dtypes=dtypes, block_size=1).page_size_bytes


@pytest.mark.parametrize("model", HYBRID_MODELS)
def test_the_requests_that_fit_are_as_many_as_vllm_counts(model: str) -> None:
    config, context, memory = HYBRID_MODELS[model], 32768, 20 * 10**9
    shapes, dtypes = vllm_state(config)
    cache = vllm_cache(config)
    size = cache.block_size
    assert size == block_tokens(config)
    gdn = MambaSpec(
        shapes=shapes,
        dtypes=dtypes,
        block_size=size,
        page_size_padded=cache.mamba_page_size_padded,
        mamba_cache_mode="align",
    )
    full = FullAttentionSpec(
        block_size=size, num_kv_heads=config["num_key_value_heads"], head_size=256, dtype=torch.bfloat16
    )
    layers = range(config["num_hidden_layers"])
    specs: dict[str, KVCacheSpec] = {str(layer): full if layer % 4 == 3 else gdn for layer in layers}
    assert list(specs.values()).count(gdn) == gdn_layers(config)
    settings = SimpleNamespace(
        cache_config=cache,
        model_config=SimpleNamespace(max_model_len=context),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        attention_config=SimpleNamespace(hisparse_config=None),
        speculative_config=None,
    )
    groups = get_kv_cache_groups(settings, specs)
    requests = get_max_concurrency_for_kv_cache_config(
        settings, get_kv_cache_config_from_groups(settings, groups, memory)
    )
    block = size * token_bytes(config)
    assert requests == memory // block / (ceil(context / size) + request_bytes(config) / block)


@pytest.mark.parametrize("page", ["models.md", "models.zh-CN.md"])
@pytest.mark.parametrize("models", [MODELS, HYBRID_MODELS], ids=["attention", "hybrid"])
def test_the_tables_in_the_docs_are_the_programs(models: dict[str, Config], page: str) -> None:
    lines = table(models).splitlines()
    assert "\n".join(lines[2:]) in (DOCS / page).read_text()
