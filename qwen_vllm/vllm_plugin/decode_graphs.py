"""On a GPU: a step in which all requests decode is three CUDA graphs, instead of one among two dozen launches.

vLLM replays the model as one graph. What is before it (positions, block tables, attention's metadata) and after it
(logits, sampling, counts) it launches from Python, kernel by kernel, in each step: with a small model the GPU waits for
that. Here vLLM's own functions run once while their kernels are recorded, and then the record is replayed.

A record holds addresses and sizes, so there is one for each number of requests, and for each of the buffers that vLLM
uses by turns. What differs from step to step on the CPU is set anew. Steps that do anything else (begin a request,
guess tokens, ask for logprobs) go vLLM's way.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from copy import copy
from logging import getLogger
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.config import CUDAGraphMode
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.sample.ops import topk_topp_triton
from vllm.v1.worker.gpu import model_runner
from vllm.v1.worker.gpu.async_utils import AsyncOutput
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler

LOG = getLogger("vllm.qwen_vllm")
MOST_PREPARED, MOST_SAMPLED = 256, 64
"""For so many requests there are records. With more a step plans longer than it launches; more logits take memory."""
OFTEN = 3
"""So many steps go vLLM's way before one like them is recorded: they compile its kernels and make their tables."""
MOST_RECORDS = 1536
"""So many are kept."""
MODEL_STATES = {"DefaultModelState", "MambaHybridModelState"}
METADATA_BUILDERS = {"FlashAttentionMetadataBuilder", "GDNAttentionMetadataBuilder"}
"""Those whose kernels depend on nothing but what is set anew."""


class Recorded(NamedTuple):
    """Kernels that can be launched again, what the function returned that launched them, and vLLM's scratch memory.

    vLLM exchanges that for a larger one, where more requests come, and then nothing else would keep it.
    """

    graph: torch.cuda.CUDAGraph
    result: Any
    scratch: list[Any]


class Prepared(NamedTuple):
    """What a step hands to the model: vLLM's batch, block tables and slot mappings, model inputs, metadata."""

    batch: InputBatch
    attention: tuple[tuple[torch.Tensor, ...], torch.Tensor]
    inputs: dict[str, Any]
    metadata: dict[str, Any]


class Tokens(AsyncModelRunnerOutput):
    """One token for each request of a step, on its way to the CPU; before the next step's, as both use one stream."""

    def __init__(self, output: ModelRunnerOutput, sampled: SamplerOutput) -> None:
        self.output = output
        self.token_ids = sampled.sampled_token_ids.to("cpu", non_blocking=True)
        self.arrival = torch.cuda.Event(blocking=True)
        self.arrival.record()

    def get_output(self) -> ModelRunnerOutput:
        """Wait for the tokens."""
        self.arrival.synchronize()
        self.output.sampled_token_ids = self.token_ids.tolist()
        return self.output


class DecodeGraphs:
    """The records of one of vLLM's model runners. Methods named as vLLM's are for its steps, with vLLM's contract.

    Attributes:
        seen: how often a step of each kind came that is not recorded.
        most: how many records there may be; 0 once one has failed.
        rows: for each request of a step its row in vLLM's states, as in the bytes `rows_now`.
        starts, ends, zeros: on the GPU, what vLLM makes anew in each step that decodes.
        counted: what a record has sampled in this step and counted; None: vLLM's way has sampled.
    """

    def __init__(self, runner: GPUModelRunner) -> None:
        self.runner = runner
        self.seen: Counter[Hashable] = Counter()
        self.records: dict[Hashable, Recorded] = {}
        self.most = MOST_RECORDS
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(runner.device)
        size, device = runner.max_num_reqs + 1, runner.device
        self.rows, self.ends = torch.zeros(size, dtype=torch.int64, device=device), torch.arange(size, device=device)
        self.zeros, self.starts = self.rows.int(), self.ends.int()
        self.rows_now = b""
        self.counted: SamplerOutput | None = None

    def take_over(self) -> None:
        """Stand between the runner and its own methods."""
        runner, state = self.runner, self.runner.model_state
        runner.prepare_inputs = self.prepare_inputs
        runner.prepare_attn = made_before("attention", runner.prepare_attn)
        state.prepare_inputs = made_before("inputs", state.prepare_inputs)
        state.prepare_attn = made_before("metadata", state.prepare_attn)
        runner.sample = self.sample
        runner.postprocess_sampled = self.postprocess_sampled
        model_runner.AsyncOutput = self.async_output

    def prepare_inputs(self, output: Any, state: Any, shape: Any, num_active_loras: int) -> InputBatch:
        """Prepare a step's inputs and what follows from them; `shape` is that of the model's graph."""
        runner, number = self.runner, len(state.req_ids)
        decodes = state.num_tokens == number and not state.has_prefill
        prepared = None
        if decodes and shape.cg_mode == CUDAGraphMode.FULL and number <= MOST_PREPARED:
            if (rows := state.idx_mapping_np.tobytes()) != self.rows_now:
                async_tensor_h2d(state.idx_mapping_np, out=self.rows[:number])
                self.rows_now = rows
            rope = runner.model_state.rope_state
            by_turns = (runner.block_tables.num_blocks, *([rope.prefill_delta] if rope else []))
            key = ("prepare", shape, number, *(buffer.gpu.data_ptr() for buffer in by_turns))
            prepared = self.replay(key, lambda: self.prepare(output, state, shape))
        if not prepared:
            return GPUModelRunner.prepare_inputs(runner, output, state, shape, num_active_loras)
        batch = copy(prepared.batch)
        batch.made_before = prepared
        batch.req_ids, batch.idx_mapping_np = state.req_ids, state.idx_mapping_np
        batch.prefill_len_np, batch.is_prefilling_np = state.prefill_len_np, state.is_prefilling_np
        batch.num_computed_prefill_tokens_np = state.num_computed_prefill_tokens_np
        batch.num_computed_tokens_np = runner.req_states.num_computed_tokens_np[state.idx_mapping_np]
        lengths = np.zeros(batch.num_reqs_after_padding, dtype=np.int32)
        np.add(batch.num_computed_tokens_np, 1, out=lengths[:number])
        batch.seq_lens_cpu_upper_bound = torch.from_numpy(lengths)
        batch.has_structured_output_reqs = output.has_structured_output_requests
        return batch

    def prepare(self, output: Any, state: Any, shape: Any) -> Prepared:
        """Prepare a step by vLLM's functions, with what they copy from the CPU taken from the GPU."""
        runner, number = self.runner, len(state.req_ids)

        def from_gpu(_: Any, out: torch.Tensor | None = None, **_options: Any) -> torch.Tensor:
            return self.rows[:number] if out is None else torch.clamp(self.starts, max=number, out=out)

        with standing_in(model_runner, "async_tensor_h2d", from_gpu):
            batch = GPUModelRunner.prepare_inputs(runner, output, state, shape, 0)
        batch.seq_lens_cpu_upper_bound.fill_(runner.max_model_len)  # as vLLM does for its own graphs
        # The records share their memory, so what outlives one has its own. These hold the same as vLLM's.
        batch.logits_indices, batch.cu_num_logits = self.ends[:number], self.starts[: number + 1]
        batch.expanded_local_pos = self.zeros[:number]
        attention = runner.prepare_attn(batch)
        inputs = runner.model_state.prepare_inputs(batch, runner.req_states)
        groups = (runner.attn_groups, runner.kv_cache_config)
        metadata = runner.model_state.prepare_attn(batch, shape.cg_mode, *attention, *groups)
        return Prepared(batch, attention, inputs, metadata)

    def sample(self, hidden_states: torch.Tensor, batch: InputBatch, grammar: Any) -> tuple[SamplerOutput, Any, Any]:
        """Sample the tokens of a batch, and count them where a record does so too."""
        runner, sampler, kind = self.runner, self.runner.sampler, None
        self.counted = None
        if "made_before" in vars(batch) and grammar is None and batch.num_reqs <= MOST_SAMPLED:
            kind = sampling_kind(sampler, batch.idx_mapping_np)
        if kind is None:
            return GPUModelRunner.sample(runner, hidden_states, batch, grammar)
        address = sampler.sampling_states.temperature.gpu.data_ptr()  # the other parameters take turns with it
        key = ("sample", kind, batch.num_reqs, hidden_states.data_ptr(), address)
        # FlashInfer takes its noise from the CPU: it would be the same in each replay.
        with standing_in(sampler, "use_flashinfer", False):
            found = self.replay(key, lambda: self.sample_and_count(hidden_states, batch))
            self.counted = found and found[0]
            return found or GPUModelRunner.sample(runner, hidden_states, batch, None)

    def sample_and_count(self, hidden_states: torch.Tensor, batch: InputBatch) -> tuple[SamplerOutput, Any, Any]:
        """Sample and count by vLLM's functions."""
        output, *numbers = GPUModelRunner.sample(self.runner, hidden_states, batch, None)
        sampled = (batch.idx_mapping, output.sampled_token_ids, *numbers, batch.query_start_loc)
        GPUModelRunner.postprocess_sampled(self.runner, *sampled)
        return output, *numbers

    def postprocess_sampled(self, *sampled: Any, **options: Any) -> None:
        """Count the sampled tokens, unless the record that sampled them has done so."""
        if self.counted is None:
            GPUModelRunner.postprocess_sampled(self.runner, *sampled, **options)

    def async_output(self, **parts: Any) -> AsyncModelRunnerOutput:
        """Return what brings a step's tokens to the CPU."""
        if parts["sampler_output"] is self.counted:
            return Tokens(parts["model_runner_output"], self.counted)
        return AsyncOutput(**parts)

    def replay(self, key: Hashable, function: Callable[[], Any]) -> Any:
        """Launch the kernels of `function`, which itself runs the first time; None where they are not recorded."""
        if key not in self.records:
            self.seen[key] += 1
            if self.seen[key] <= OFTEN or len(self.records) >= self.most:
                return None
            try:
                self.records[key] = self.record(function)
            except Exception as error:  # for one, no memory is left; vLLM's way is still there
                LOG.warning("No more steps are recorded, which is slower with a small model: %r", error)
                self.most = 0
                return None
        record = self.records[key]
        record.graph.replay()
        return record.result

    def record(self, function: Callable[[], Any]) -> Recorded:
        """Run a function whose kernels are recorded instead of launched."""
        graph = torch.cuda.CUDAGraph()
        prefill_len = self.runner.req_states.prefill_len
        # Of vLLM's two buffers with the lengths of the prompts either would do: each request here is beyond its prompt.
        with torch.cuda.stream(self.stream), standing_in(prefill_len, "gpu", self.zeros):
            graph.capture_begin(self.pool, capture_error_mode="thread_local")
            try:
                result = function()
            finally:
                graph.capture_end()
        caches: tuple[dict[Any, Any], ...] = (
            topk_topp_triton._TRITON_BUFFER_CACHE,
            topk_topp_triton._TRITON_TABLE_CACHE,
            topk_topp_triton._TRITON_SPLIT_CACHE,
        )
        return Recorded(graph, result, [tensors for cache in caches for tensors in cache.values()])


@contextmanager
def standing_in(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an attribute another value while the block runs."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def made_before(part: str, vllms: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that gives a part of what a record has made for a batch; without a record, it is vLLM's."""

    def find(batch: InputBatch, *others: Any, **options: Any) -> Any:
        prepared = vars(batch).get("made_before")
        return getattr(prepared, part) if prepared else vllms(batch, *others, **options)

    return find


def can_record(runner: GPUModelRunner) -> bool:
    """Tell whether the kernels of a model runner's steps depend on nothing but what `DecodeGraphs` sets anew."""
    groups = [group for groups in runner.attn_groups for group in groups]
    builders = {type(builder).__name__ for group in groups for builder in group.metadata_builders}
    special = (
        *(runner.lora_config, runner.speculative_config, runner.pcp_manager, runner.aux_output_connector),
        *(runner.fast_prefill, runner.batch_sharder, runner.ubatch_runner, runner.is_pooling_model),
    )
    sampler = runner.sampler
    return (
        type(runner) is GPUModelRunner
        and type(runner.model_state).__name__ in MODEL_STATES
        and builders <= METADATA_BUILDERS
        and runner.parallel_config.world_size == runner.dp_size == 1
        and runner.model_config.rswa_window is None
        and not any(special)
        and type(sampler) is Sampler
        and not (sampler.compute_nans or sampler.trace_replay_state or sampler.return_sampling_mask)
    )


def sampling_kind(sampler: Sampler, rows: np.ndarray) -> tuple[bool, ...] | None:
    """Tell by which kernels the requests in these rows are sampled; None where by more than is recorded."""
    if sampler.get_logprobs_dims(rows):
        return None
    if not sampler.needs_logits_processing[rows].any():
        return ()
    states, budgets = sampler.sampling_states, sampler.thinking_budget_state
    bias, penalties, bad_words, *others = sampler.logits_processors
    if (
        others
        or bias.use_logit_bias[rows].any()
        or bad_words.num_bad_words.np[rows].any()
        or (budgets.enabled and budgets.use_thinking_budget[rows].any())
    ):
        return None
    temperatures = states.temperature.np[rows]
    flags = (
        penalties.use_penalty[rows],
        (temperatures != 0) & (temperatures != 1),
        states.min_p.np[rows],
        states.top_k.np[rows] != states.vocab_size,
        states.top_p.np[rows] != 1,
    )
    return tuple(bool(flag.any()) for flag in flags)


def records_steps(capture_model: Callable[..., int]) -> Callable[..., int]:
    """Record, once vLLM has captured the model, also what is before and after it."""

    def capture(runner: GPUModelRunner, *, profile_only: bool = False) -> int:
        used = capture_model(runner, profile_only=profile_only)
        if not profile_only and can_record(runner):
            DecodeGraphs(runner).take_over()
        return used

    return capture
