"""First-generation Qwen as a vLLM model: Qwen2, with its weights renamed while they are loaded.

vLLM imports this module by name (`qwen_v1.register`) in the processes that load the model.
"""

from collections.abc import Iterable
from typing import ClassVar

import torch
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.utils import WeightsMapper


class QwenV1ForCausalLM(Qwen2ForCausalLM):
    """Takes a checkpoint of `QWenLMHeadModel`, plain or quantized by GPTQ.

    Queries, keys and values are one matrix there, of shape [3 * hidden, hidden], as they are in vLLM, which splits it
    among GPUs. The MLP is c_proj(w1(x) * silu(w2(x))): w2 is the gate.
    """

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_substr={
            ".ln_1": ".input_layernorm",
            ".ln_2": ".post_attention_layernorm",
            ".attn.c_attn": ".self_attn.qkv_proj",
            ".attn.c_proj": ".self_attn.o_proj",
            ".mlp.w1": ".mlp.up_proj",
            ".mlp.w2": ".mlp.gate_proj",
            ".mlp.c_proj": ".mlp.down_proj",
        },
        orig_to_new_prefix={
            "transformer.wte": "model.embed_tokens",
            "transformer.h.": "model.layers.",
            "transformer.ln_f": "model.norm",
            "transformer.rotary_emb": "model.rotary_emb",
        },
    )
    packed_modules_mapping: ClassVar = {"qkv_proj": ["qkv_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load tensors under their first-generation names; return the names of the parameters that are set."""
        return super().load_weights(self.hf_to_vllm_mapper.apply(weights))
