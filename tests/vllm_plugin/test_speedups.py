"""The shorter ways: steps are planned and tokens become text as in vLLM, with less work."""

import random
from typing import Any
from unittest.mock import patch

import pytest
import torch
from tokenizers import decoders
from vllm import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.request import RequestStatus

from qwen_vllm.vllm_plugin.speedups import PROMPT_END, QuickDetokenizer, QuickKVCacheManager
from tests.support.scheduler_steps import BLOCK, SPEC, Steps
from tests.support.tiny_families import FAMILIES, PIECES, tokenizer_of

WINDOW = SlidingWindowSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32, sliding_window=40)
TIGHT = {"max_num_seqs": 32, "max_model_len": 400, "max_num_batched_tokens": 100}


def day_of(manager: type[KVCacheManager], seed: int, caching: bool, specs: tuple) -> list[Any]:
    """What a scheduler with too few blocks decided, step by step, on requests that come, share prefixes, and leave."""
    chance = random.Random(seed)
    steps = Steps(manager, caching, 60, specs, **TIGHT)
    pool, seen, names = steps.scheduler.kv_cache_manager.block_pool, [], []
    prefixes = [[chance.randrange(1000) for _ in range(chance.randrange(10, 120))] for _ in range(4)]
    for number in range(400):
        if number < 300 and chance.random() < 0.2:
            names.append(f"request {number}")
            tail = [chance.randrange(1000) for _ in range(chance.randrange(1, 100))]
            params = SamplingParams(max_tokens=chance.randrange(1, 150), ignore_eos=True)
            steps.add(names[-1], chance.choice(prefixes) + tail, params)
        if names and chance.random() < 0.02:
            steps.scheduler.finish_requests(chance.choice(names), RequestStatus.FINISHED_ABORTED)
        plan, outputs = steps.step()
        seen.append([plan.num_scheduled_tokens, plan.preempted_req_ids, plan.finished_req_ids])
        seen.append([(new.req_id, new.num_computed_tokens, new.block_ids) for new in plan.scheduled_new_reqs])
        known = plan.scheduled_cached_reqs
        seen.append([known.req_ids, known.resumed_req_ids, known.new_block_ids, known.num_computed_tokens])
        seen.append(
            [(out.request_id, out.new_token_ids, out.finish_reason) for o in outputs.values() for out in o.outputs]
        )
        seen.append([pool.get_num_free_blocks(), len(pool.cached_block_hash_to_block)])
    return seen


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("specs", [(SPEC,), (WINDOW,), (SPEC, WINDOW)], ids=["full", "window", "both"])
def test_steps_are_planned_as_by_vllm(specs: tuple, caching: bool) -> None:
    preempted = 0
    for seed in range(2):
        seen = day_of(QuickKVCacheManager, seed, caching, specs)
        assert seen == day_of(KVCacheManager, seed, caching, specs)
        preempted += sum(len(preempted or ()) for _, preempted, _ in seen[::5])
    assert preempted


@pytest.mark.parametrize("caching", [False, True])
def test_a_growing_answer_asks_for_a_block_when_its_last_is_full(caching: bool) -> None:
    steps = Steps(QuickKVCacheManager, caching)
    ask = FullAttentionManager.allocate_new_blocks
    with patch.object(FullAttentionManager, "allocate_new_blocks", autospec=True, side_effect=ask) as asked:
        steps.add("a request", list(range(40)), SamplingParams(max_tokens=160, ignore_eos=True))
        tokens = 0
        while steps.scheduler.has_requests():
            _, outputs = steps.step()
            tokens += sum(len(output.new_token_ids) for answers in outputs.values() for output in answers.outputs)
    assert tokens == 160
    assert asked.call_count <= 2 * 160 / BLOCK + 2


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_become_text_as_by_vllm_without_all_of_the_prompt(name: str) -> None:
    tokenizer, chance = tokenizer_of(name), random.Random(name)
    params = SamplingParams(max_tokens=1)
    for _ in range(20):
        prompt, answer = ("".join(chance.choices(PIECES, k=count)) for count in (chance.choice((1, 100)), 20))
        ids = tokenizer.encode(prompt + "a", add_special_tokens=False)
        cut, ids = len(ids), ids + tokenizer.encode(answer, add_special_tokens=False)
        request = EngineCoreRequest("", ids[:cut], None, params, None, 0.0, None, None, None)
        with patch.object(decoders, "DecodeStream", side_effect=decoders.DecodeStream) as streams:
            quick, vllms = (kind(tokenizer, request) for kind in (QuickDetokenizer, QuickDetokenizer.__base__))
        texts = [[detokenizer.decode_next(token) for token in ids[cut:]] for detokenizer in (quick, vllms)]
        assert texts[0] == texts[1]
        assert cut <= PROMPT_END or len(streams.call_args_list[1].kwargs["ids"]) == PROMPT_END
