"""vLLM's runner for GPUs on a CPU: its Python is vLLM's own, its kernels and CUDA graphs are stand-ins."""

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.v1.worker.gpu import buffer_utils, model_runner
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.sample import logit_bias, penalties, sampler, states
from vllm.v1.worker.gpu.states import RequestState

from qwen_vllm.vllm_plugin import decode_graphs

VOCABULARY, ROWS, LENGTH = 50, 12, 64
CPU = torch.device("cpu")


class Graph(TorchDispatchMode):
    """A CUDA graph: operations are noted instead of done, and a replay does them on the same memory.

    Graphs share the memory of what they make: a replay spoils what the others have made.
    """

    captured: ClassVar[list["Graph"]] = []
    is_capturing = False
    replays = 0

    def capture_begin(self, _pool: Any, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.made: list[torch.Tensor] = []
        Graph.is_capturing = True
        self.__enter__()

    def capture_end(self) -> None:
        self.__exit__(None, None, None)
        Graph.is_capturing = False
        Graph.captured.append(self)

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if function._schema.is_mutable:
            result = options.get("out", args[0])
        else:
            result = function(*args, **options)
            given = {memory(tensor) for tensor in tensors((args, options))}
            self.made += [tensor for tensor in tensors(result) if memory(tensor) not in given]
        self.operations.append((function, args, options, result))
        return result

    def replay(self) -> None:
        Graph.replays += 1
        for function, args, options, result in self.operations:
            for before, now in zip(tensors(result), tensors(function(*args, **options)), strict=True):
                if memory(before) != memory(now):
                    before.copy_(now)
        for graph in Graph.captured:
            for tensor in graph.made if graph is not self else ():
                tensor.fill_(1 if tensor.dtype == torch.bool else 10**6)


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def rows_of(starts: torch.Tensor, number: int, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each token of a step its row in the batch, and its place among that row's tokens."""
    row = torch.searchsorted(starts[1 : number + 1].contiguous(), tokens, right=True).clamp(max=number - 1)
    return row, tokens - starts[row]


def prepare_prefill_inputs(ids: Any, _next: Any, rows: Any, starts: Any, known: Any, _: Any, done: Any) -> None:
    row, place = rows_of(starts, len(rows), torch.arange(len(ids), dtype=torch.int32))
    ids.copy_(known[rows[row], (done[rows[row]] + place).clamp(max=LENGTH - 1).long()])


def prepare_pos_seq_lens(rows: Any, starts: Any, done: Any, positions: Any, lengths: Any) -> None:
    number = len(rows)
    row, place = rows_of(starts, number, torch.arange(len(positions), dtype=torch.int32))
    positions.copy_(done[rows[row]] + place)
    lengths[:number].copy_(done[rows] + starts[1 : number + 1] - starts[:number])
    lengths[number:].zero_()


def combine(
    ids: Any, rows: Any, last: Any, starts: Any, lengths: Any, prompts: Any, _drafts: Any, _counts: Any, *_: Any
) -> Any:
    ends = (starts[1 : len(rows) + 1] - 1).long()
    answers = lengths[: len(rows)] > prompts[rows]
    ids.index_put_((ends,), torch.where(answers, last[rows, 0].int(), ids[ends]))
    return ends


def post_update(rows: Any, done: Any, last: Any, seen: Any, ids: Any, *others: Any) -> None:
    sampled, rejected, starts, known, total = others
    whole = sampled > 0
    last.index_put_((rows, torch.zeros_like(rows)), torch.where(whole, ids[:, 0], last[rows, 0]))
    seen.index_put_((rows, ids[:, 0]), sampled, accumulate=True)
    place = (rows, total[rows].long())
    known.index_put_(place, torch.where(whole, ids[:, 0].int(), known[place]))
    total.index_put_((rows,), total[rows] + sampled)
    done.index_put_((rows,), done[rows] + starts[1 : len(rows) + 1] - starts[: len(rows)] - rejected)


def get_num_sampled_and_rejected(ones: Any, lengths: Any, counts: Any, rows: Any, prompts: Any) -> Any:
    sampled = torch.where(lengths[: len(rows)] < prompts[rows], torch.zeros_like(ones), ones)
    return sampled, counts[1:] - counts[:-1] - 1 + torch.zeros_like(sampled)


def gumbel_sample(logits: Any, rows: Any, temperature: Any, seeds: Any, places: Any, **_options: Any) -> Any:
    """Noise from the seed and the place alone, and none without a temperature."""
    angle = (seeds[rows] % 1000 + 31 * places)[:, None] * torch.arange(1, VOCABULARY + 1)
    return (logits + 3 * torch.sin(angle) * (temperature[rows] > 0)[:, None]).argmax(-1)


def apply_penalties(logits: Any, rows: Any, *others: Any) -> None:
    *_, presence, _prompts, answers = others
    logits.sub_(presence[rows][:, None] * (answers[rows] > 0))


def apply_temperature(logits: Any, rows: Any, temperature: Any) -> None:
    logits.div_(torch.where(temperature == 0, 1, temperature)[rows][:, None])


def apply_logit_bias(logits: Any, rows: Any, *others: Any) -> None:
    number, ids, bias = others[3:6]
    for place, row in enumerate(rows.tolist()):
        logits[place, ids[row, : number[row]].long()] += bias[row, : number[row]]


def apply_write(written: buffer_utils.StagedWriteTensor) -> None:
    begins = [0, *written._staged_write_cu_lens]
    places = zip(written._staged_write_indices, written._staged_write_starts, begins, begins[1:], strict=False)
    for row, start, begin, end in places:
        values = torch.tensor(written._staged_write_contents[begin:end], dtype=written.dtype)
        written.gpu.view(len(written.gpu), -1)[row, start : start + end - begin] = values
    written.clear_staged_writes()


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kernels and CUDA be this module's."""
    for module, *functions in (
        (model_runner, prepare_prefill_inputs, prepare_pos_seq_lens, post_update),
        (sampler, get_num_sampled_and_rejected, gumbel_sample),
        (logit_bias, apply_logit_bias),
        (penalties, apply_penalties),
        (states, apply_temperature),
    ):
        for function in functions:
            monkeypatch.setattr(module, function.__name__, function)
    monkeypatch.setattr(model_runner, "combine_sampled_and_draft_tokens", combine)
    monkeypatch.setattr(penalties, "bincount", lambda rows, *lists: lists[4].index_fill_(0, rows, 0))
    monkeypatch.setattr(buffer_utils.StagedWriteTensor, "apply_write", apply_write)
    monkeypatch.setattr(buffer_utils, "is_uva_available", lambda: False)
    for module in (model_runner, decode_graphs):
        monkeypatch.setattr(module, "AsyncOutput", lambda **_: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: SimpleNamespace(record=lambda: None, synchronize=lambda: None))
    monkeypatch.setattr(Graph, "captured", [])
    monkeypatch.setattr(Graph, "replays", 0)


class ModelState:
    """Makes positions that differ by request, as for images, and takes down what the model's attention would read."""

    num_new_sampled_tokens_per_step = 1

    def __init__(self) -> None:
        self.rope_state = SimpleNamespace(prefill_delta=buffer_utils.UvaBackedTensor(ROWS, dtype=torch.int32))
        self.positions = torch.zeros(LENGTH, dtype=torch.int64)

    def prepare_inputs(self, batch: InputBatch, _states: Any) -> dict:
        row, _ = rows_of(batch.query_start_loc, batch.num_reqs, torch.arange(LENGTH, dtype=torch.int32))
        delta = self.rope_state.prefill_delta.gpu
        positions = torch.zeros_like(self.positions)
        positions[: len(batch.positions)] = batch.positions
        self.positions.copy_(positions + delta[batch.idx_mapping[row]])
        return {}

    def prepare_attn(self, batch: InputBatch, *_: Any) -> dict:
        return {"lengths": batch.seq_lens}

    def postprocess_state(self, *_: Any) -> None:
        pass


ModelState.__name__ = "DefaultModelState"


def runner() -> Any:
    """One of vLLM's runners, with a model whose next token depends on the last one, its place and its blocks."""
    made: Any = object.__new__(GPUModelRunner)
    torch.manual_seed(0)
    absent = (
        *("adaptive_verification", "aux_output_connector", "batch_sharder", "fast_prefill", "lora_config"),
        *("pcp_manager", "rejection_sampler", "speculative_config", "ubatch_runner"),
    )
    requests = RequestState(ROWS, LENGTH, LENGTH, 0, VOCABULARY, CPU)
    tables = SimpleNamespace(num_blocks=buffer_utils.UvaBackedTensor((1, ROWS), dtype=torch.int32))
    tables.gather_block_tables = lambda rows, num_reqs_padded: (10 * tables.num_blocks.gpu[0, rows],)
    tables.compute_slot_mappings = lambda _rows, _starts, positions, num_tokens_padded: positions[:num_tokens_padded]
    embedding, head = torch.randn(VOCABULARY, 16), torch.randn(16, VOCABULARY)
    vars(made).update(
        dict.fromkeys(absent),
        use_pp=False,
        is_last_pp_rank=True,
        is_pooling_model=False,
        decode_query_len=1,
        device=CPU,
        max_num_reqs=ROWS,
        max_model_len=LENGTH,
        attn_groups=[],
        kv_cache_config=None,
        parallel_config=SimpleNamespace(world_size=1, data_parallel_size=1),
        model_config=SimpleNamespace(rswa_window=None),
        input_buffers=InputBuffers(ROWS, LENGTH, CPU),
        req_states=requests,
        block_tables=tables,
        model_state=ModelState(),
        sampler=sampler.Sampler(VllmConfig(), ROWS, VOCABULARY, CPU, requests),
        model=SimpleNamespace(compute_logits=lambda hidden: hidden @ head),
        embedding=embedding,
        hidden_states=torch.zeros(LENGTH, 16),
    )
    return made


def step(made: Any, tokens: dict[str, int], turns: tuple[bool, bool]) -> tuple[InputBatch, list[list[int]]]:
    """One step of requests with so many tokens each, as `execute_model` and `sample_tokens` do it.

    vLLM's buffers take `turns`: those of the sampling parameters, and that of the blocks.
    """
    output = SimpleNamespace(
        num_scheduled_tokens=tokens,
        total_num_scheduled_tokens=sum(tokens.values()),
        scheduled_spec_decode_tokens={},
        has_structured_output_requests=False,
    )
    made.req_states.num_computed_prefill_tokens[:] = made.req_states.num_computed_tokens_np
    if turns[0]:
        made.sampler.apply_staged_writes()
    if turns[1]:
        made.block_tables.num_blocks.copy_to_uva()
    state, _ = GPUModelRunner.gather_batch_req_state(made, output, False)
    total = output.total_num_scheduled_tokens
    if state.has_prefill:
        shape = BatchExecutionDescriptor(CUDAGraphMode.NONE, total, None)
    else:
        shape = BatchExecutionDescriptor(CUDAGraphMode.FULL, total + total % 2, total + total % 2)
    batch = made.prepare_inputs(output, state, shape, 0)
    (blocks,), _ = made.prepare_attn(batch)
    made.model_state.prepare_inputs(batch, made.req_states)
    lengths = made.model_state.prepare_attn(batch, shape.cg_mode)["lengths"]
    number = batch.num_reqs
    row, _ = rows_of(batch.query_start_loc, number, torch.arange(total, dtype=torch.int32))
    places = (made.model_state.positions[:total] + lengths[row] + blocks[row])[:, None]
    made.hidden_states[:total] = made.embedding[batch.input_ids[:total].long()] + torch.sin(places * torch.arange(16))
    sampled, *numbers = made.sample(made.hidden_states[: shape.num_tokens], batch, None)
    ids = sampled.sampled_token_ids.tolist()
    counts = numbers[0].tolist()
    later = model_runner.AsyncOutput(model_runner_output=SimpleNamespace(), sampler_output=sampled)
    if later:
        ids, counts = later.get_output().sampled_token_ids, [1] * number
    made.postprocess_sampled(batch.idx_mapping, sampled.sampled_token_ids, *numbers, batch.query_start_loc)
    return batch, [[*each[:count]] for each, count in zip(ids, counts, strict=True)]
