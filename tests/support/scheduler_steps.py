"""vLLM's scheduler, driven step by step without a model."""

from unittest.mock import patch

import torch
from vllm import EngineArgs, SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched import scheduler
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from qwen_vllm.models.demo import demo_model

BLOCK, TOKEN = 16, 5
SPEC = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)


class Steps:
    """vLLM's scheduler with a manager of blocks, and a model in its place that says the same token again and again."""

    def __init__(
        self,
        manager: type[KVCacheManager],
        caching: bool,
        num_blocks: int = 60_000,
        specs: tuple[AttentionSpec, ...] = (SPEC,),
        **flags: object,
    ) -> None:
        flags = {"max_num_seqs": 1024, "enable_prefix_caching": caching, **flags}
        config = EngineArgs(str(demo_model()), **flags).create_engine_config()
        config.cache_config.num_gpu_blocks = num_blocks
        groups = [KVCacheGroupSpec([f"layer {i}"], spec) for i, spec in enumerate(specs)]
        cache = KVCacheConfig(num_blocks, kv_cache_tensors=[], kv_cache_groups=groups)
        hash_tokens = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_tokens)
        self._hasher = get_request_block_hasher(BLOCK, hash_tokens) if caching else None
        with patch.object(scheduler, "KVCacheManager", manager):
            structured = StructuredOutputManager(config)
            self.scheduler = AsyncScheduler(config, cache, structured, BLOCK, BLOCK, log_stats=True)
        self._running: list[tuple[SchedulerOutput, ModelRunnerOutput]] = []

    def add(self, name: str, prompt: list[int], params: SamplingParams) -> None:
        """A new request."""
        self.scheduler.add_request(Request(name, prompt, params, None, block_hasher=self._hasher))

    def step(self) -> tuple[SchedulerOutput, dict[int, EngineCoreOutputs]]:
        """Plans a step and, as vLLM does, takes the results of the one before while it runs.

        Returns:
            (the plan, outputs)
        """
        plan = self.scheduler.schedule()
        names = list(plan.num_scheduled_tokens)
        if names:
            sampled = [[] if self.scheduler.requests[name].is_prefill_chunk else [TOKEN] for name in names]
            self._running.append((plan, ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, sampled)))
        done = self._running.pop(0) if self._running and (len(self._running) > 1 or not names) else None
        return plan, self.scheduler.update_from_output(*done) if done else {}
