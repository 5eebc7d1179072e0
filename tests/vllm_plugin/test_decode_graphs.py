"""Steps that decode from CUDA graphs: the tokens are the same as by vLLM's own way."""

import random
import weakref
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.ops import topk_topp_triton
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.sample import sampler
from vllm.v1.worker.gpu.sample.states import SamplingStates

from qwen_vllm.vllm_plugin import decode_graphs
from qwen_vllm.vllm_plugin.patches import DECODE_GRAPHS
from tests.support import gpu_on_cpu
from tests.support.gpu_on_cpu import VOCABULARY, Graph, runner, step

KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1},
    {"temperature": 0.7},
    {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
    {"temperature": 0.7, "presence_penalty": 1.5},
    {"temperature": 0.7, "logit_bias": {3: 1.0}},
]
"""Sampling parameters; steps with the last ones are not sampled by records."""


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_on_cpu.stand_in(monkeypatch)


def day_of(made: Any, kinds: list[dict[str, Any]], steps: int = 400) -> dict[str, list[int]]:
    """The answers to requests that come and go by chance: a step reads the prompts of those that are new."""
    chance = random.Random(1)
    running: dict[str, int] = {}
    answers: dict[str, list[int]] = {}
    has_blocks = False
    for number in range(steps):
        new = chance.random() < 0.1 and len(running) < 6
        if new:
            name, prompt = f"request {number}", [chance.randrange(VOCABULARY) for _ in range(chance.randrange(1, 9))]
            made.req_states.add_request(name, len(prompt), prompt, 0, 50)
            row = made.req_states.req_id_to_index[name]
            made.sampler.add_request(row, SamplingParams(**chance.choice(kinds), seed=number))
            made.block_tables.num_blocks.np[0, row] = chance.randrange(9)
            made.req_states.apply_staged_writes()
            made.model_state.rope_state.prefill_delta.np[row] = chance.randrange(9)
            made.model_state.rope_state.prefill_delta.copy_to_uva()
            running[name], answers[name] = chance.randrange(1, 50), []
            has_blocks = True
        if not running:
            continue
        states = made.req_states
        tokens = {}
        for name in running:
            row = states.req_id_to_index[name]
            tokens[name] = max(1, int(states.prefill_len.np[row] - states.num_computed_tokens_np[row]))
        batch, ids = step(made, tokens, (new or chance.random() < 0.5, has_blocks or chance.random() < 0.5))
        has_blocks = False
        computed = states.num_computed_tokens_np[batch.idx_mapping_np]
        assert batch.num_computed_tokens_np.tolist() == computed.tolist()
        ends = [before + tokens[name] for before, name in zip(computed, batch.req_ids, strict=True)]
        assert batch.seq_lens_cpu_upper_bound.tolist()[: len(ends)] == ends
        for name, more in zip(batch.req_ids, ids, strict=True):
            answers[name] += more
            row = states.req_id_to_index[name]
            states.num_computed_tokens_np[row] += tokens[name]
            if chance.random() < 0.1:
                made.block_tables.num_blocks.np[0, row] += 1
                has_blocks = True
            running[name] -= 1
            if not running[name]:
                del running[name]
                states.remove_request(name)
    return answers


@pytest.mark.parametrize(("kinds", "replays"), [(KINDS[:1], 320), (KINDS[1:5], 320), (KINDS, 200)])
def test_the_tokens_are_those_of_vllms_way(kinds: list[dict[str, Any]], replays: int) -> None:
    theirs = day_of(runner(), kinds)
    assert Graph.replays == 0
    made = runner()
    decode_graphs.DecodeGraphs(made).take_over()
    assert day_of(made, kinds) == theirs
    assert len({*map(tuple, theirs.values())}) > 20
    assert Graph.replays > replays  # of 400 steps, two for each of those that decode


@pytest.mark.parametrize("works", [0, 4])
def test_where_no_more_can_be_recorded_steps_go_on_in_vllms_way(
    works: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def capture_end(graph: Graph) -> None:
        end(graph)
        if len(Graph.captured) > works:
            raise torch.OutOfMemoryError("no memory is left")

    theirs, end = day_of(runner(), KINDS), Graph.capture_end
    monkeypatch.setattr(Graph, "capture_end", capture_end)
    made = runner()
    decode_graphs.DecodeGraphs(made).take_over()
    assert day_of(made, KINDS) == theirs
    assert ["no memory is left" in record.message for record in dict.fromkeys(caplog.records)].count(True) == 1
    assert len(Graph.captured) == works + 1
    assert (Graph.replays > 0) == (works > 0)


def test_records_are_not_without_number(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = day_of(runner(), KINDS)
    monkeypatch.setattr(decode_graphs, "MOST_RECORDS", 3)
    made = runner()
    decode_graphs.DecodeGraphs(made).take_over()
    assert day_of(made, KINDS) == theirs
    assert len(Graph.captured) == 3


@pytest.mark.parametrize(
    ("change", "records"),
    [({}, True), ({"lora_config": 1}, False), ({"speculative_config": 1}, False), ({"aux_output_connector": 1}, False)],
)
def test_what_is_recorded(monkeypatch: pytest.MonkeyPatch, change: dict, records: bool) -> None:
    made = runner()
    vars(made).update(change)
    captured: list[bool] = []
    monkeypatch.setattr(GPUModelRunner, "capture_model", lambda _runner, profile_only: captured.append(profile_only))
    with DECODE_GRAPHS.applied():
        made.capture_model(profile_only=True)
        assert "prepare_inputs" not in vars(made)
        made.capture_model()
    assert captured == [True, False]
    assert ("prepare_inputs" in vars(made)) is records


def test_requests_for_logprobs_go_vllms_way() -> None:
    made = runner()
    for row, logprobs in enumerate((None, 2)):
        made.sampler.add_request(row, SamplingParams(temperature=0, logprobs=logprobs))
    kinds = [decode_graphs.sampling_kind(made.sampler, torch.tensor(rows).numpy()) for rows in ([0], [0, 1])]
    assert kinds == [(), None]


def test_flashinfer_whose_noise_would_repeat_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[bool] = []

    def flashinfer_sample(logits: torch.Tensor, *_: Any) -> torch.Tensor:
        captured.append(Graph.is_capturing)
        return logits.argmax(-1)

    monkeypatch.setattr(sampler, "flashinfer_sample", flashinfer_sample)
    monkeypatch.setattr(SamplingStates, "any_explicit_seed", lambda *_: False)
    made = runner()
    made.sampler.use_flashinfer = True
    decode_graphs.DecodeGraphs(made).take_over()
    day_of(made, KINDS[3:4])
    assert captured and not any(captured)  # the steps that read prompts have it
    assert Graph.replays > 300
    assert made.sampler.use_flashinfer


def test_scratch_memory_that_vllm_exchanges_stays_with_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = {"small": torch.zeros(1)}
    memory = weakref.ref(cache["small"])
    monkeypatch.setattr(topk_topp_triton, "_TRITON_BUFFER_CACHE", cache)
    made = runner()
    decode_graphs.DecodeGraphs(made).take_over()
    day_of(made, KINDS[:1])
    cache.clear()
    assert memory() is not None
