"""Tiny random checkpoints of model families: the published network, control tokens, and chat template.

Of the templates only the part that deals with plain conversations. Qwen's vocabulary is the real one, those of the
others are trained here on this project's READMEs, in the manner of the family: bytes, or pieces with "▁" for a space.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from qwen_vllm.models.qwen_v1 import SPECIAL_TOKENS
from qwen_vllm.protocol import Turn
from tests.support import ROOT
from tests.support.tokenizers import PLAIN_TOKENS, QWEN25_TEMPLATE, qwen_tokenizer

CONTEXT = 1024

CHATML = r"""
{%- for message in messages %}
    {%- if loop.first and messages[0]['role'] != 'system' %}
        {{- '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
QWEN3 = r"""
{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}
{%- set ns = namespace(searching=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and not(message.content.startswith('<tool_response>')
            and message.content.endswith('</tool_response>')) %}
        {%- set ns.searching = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set thoughts = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thoughts = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {{- '<|im_start|>assistant\n<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""
TAKEN_APART = r"""
        {%- elif '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}"""
SYSTEM35 = r"""
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content|trim + '<|im_end|>\n' }}
{%- endif %}"""
SYSTEM38 = r"""
{%- set effort = '' %}
{%- if enable_thinking is undefined or enable_thinking %}
    {%- set level = reasoning_effort|default('xhigh') %}
    {%- if level not in ('low', 'medium', 'xhigh') %}{{- raise_exception('There is no effort ' + level) }}{%- endif %}
    {%- if level != 'medium' %}{%- set effort = 'Think with the effort ' + level + '.' %}{%- endif %}
{%- endif %}
{%- set system = messages[0].content|trim if messages[0].role == 'system' else '' %}
{%- if system or effort %}
    {{- '<|im_start|>system\n' + effort + ('\n\n' if system and effort else '') + system + '<|im_end|>\n' }}
{%- endif %}"""
TURNS35 = r"""
{%- for message in messages %}
    {%- set content = message.content|trim %}
    {%- if message.role == 'system' and not loop.first %}
        {{- raise_exception('System message must be at the beginning.') }}
    {%- elif message.role == 'user' %}
        {{- '<|im_start|>user\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set thoughts = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thoughts = message.reasoning_content %}TAKEN_APART
        {%- endif %}
        {%- set thoughts = '<think>\n' + thoughts|trim + '\n</think>\n\n' if KEPT else '' %}
        {{- '<|im_start|>assistant\n' + thoughts + content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- else %}
        {{- '<think>\n' }}
    {%- endif %}
{%- endif %}"""
TURNS35, TURNS38 = TURNS35.replace("TAKEN_APART", TAKEN_APART), TURNS35.replace("TAKEN_APART", "")
QWEN35 = SYSTEM35 + TURNS35.replace("KEPT", "false")
QWEN36 = SYSTEM35 + TURNS35.replace("KEPT", "preserve_thinking is true")
QWEN38 = SYSTEM38 + TURNS38.replace("KEPT", "preserve_thinking is not false")
DEEPSEEK = r"""
{%- set ns = namespace(system='') %}
{%- for message in messages if message['role'] == 'system' %}{%- set ns.system = message['content'] %}{%- endfor %}
{{- '<｜begin▁of▁sentence｜>' + ns.system }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{{- '<｜User｜>' + message['content'] }}{%- endif %}
    {%- if message['role'] == 'assistant' %}
        {%- set content = message['content'] %}
        {%- if '</think>' in content %}{%- set content = content.split('</think>')[-1] %}{%- endif %}
        {{- '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜><think>\n' }}{%- endif %}"""
CHATGLM3 = (
    r"{% for message in messages %}{% if loop.first %}[gMASK]sop{% endif %}<|{{ message['role'] }}|>{{ '\n ' }}"
    r"{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
YI = r"""
{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- '<|im_start|>user\n' + message['content'] + '<|im_end|>\n<|im_start|>assistant\n' }}
    {%- elif message['role'] == 'assistant' %}
        {{- message['content'] + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}"""
LLAMA3 = r"""
{%- for message in messages %}
    {%- if loop.first %}{{- bos_token }}{%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""
LLAMA31 = r"""
{%- set system = '' %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- bos_token + '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n' }}
{{- 'Today Date: 26 Jul 2024\n\n' + system + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""
ALTERNATING = r"""
{%- for message in messages if message['role'] != 'system' %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
{%- endfor %}"""
MISTRAL3 = (
    ALTERNATING
    + r"""
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'user' and loop.last and messages[0]['role'] == 'system' %}
        {{- '[INST] ' + messages[0]['content'] + '\n\n' + message['content'] + '[/INST]' }}
    {%- elif message['role'] == 'user' %}
        {{- '[INST] ' + message['content'] + '[/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}"""
)
MISTRAL7 = r"""
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + message['content'] + '[/INST]' }}
    {%- elif message['role'] == 'system' %}
        {{- '[SYSTEM_PROMPT] ' + message['content'] + '[/SYSTEM_PROMPT]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}"""
MISTRAL1 = MISTRAL3.replace("[/INST]", " [/INST]").replace("loop.last", "loop.index0 == 1")
VICUNA = r"""
{%- for message in messages %}
    {{- message.role|upper + ': ' + message.content + (eos_token if message.role == 'assistant' else ' ') }}
{%- endfor %}ASSISTANT:"""
GEMMA2 = (
    r"""{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"""
    + ALTERNATING
    + r"""
{%- for message in messages %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"""
)
GEMMA3 = r"""
{{- bos_token }}
{%- set prefix = '' %}
{%- if messages[0]['role'] == 'system' %}
    {%- set prefix = messages[0]['content'] + '\n\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\n' + (prefix if loop.first else '') + message['content'] | trim }}
    {{- '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"""


@dataclass(frozen=True)
class Family:
    """A family of models.

    `plain`: added tokens that are not marked as special. `joins_system`: its template takes no system prompt.
    `config`: what its config.json says beyond the tiny sizes.
    """

    template: str | None
    vocabulary: Callable[[], Tokenizer]
    control: tuple[str, ...]
    eos: str
    plain: tuple[str, ...] = ()
    bos: str | None = None
    joins_system: bool = False
    config: dict[str, Any] = field(default_factory=dict)

    def tokenizer(self, small: bool = False) -> PreTrainedTokenizerFast:
        """The family's tokenizer, with its chat template; `small`: never with Qwen's real vocabulary."""
        vocabulary = _bytes() if small and self.vocabulary is _qwen else self.vocabulary()
        vocabulary.add_special_tokens([*self.control])
        vocabulary.add_tokens([AddedToken(token, normalized=False, special=False) for token in self.plain])
        return PreTrainedTokenizerFast(
            tokenizer_object=vocabulary,
            bos_token=self.bos,
            eos_token=self.eos,
            chat_template=self.template,
            clean_up_tokenization_spaces=False,
        )

    def messages(self, system: str, history: list[Turn], query: str) -> list[dict[str, str]]:
        """A conversation as the family's template takes it."""
        texts = [*(text for turn in history for text in turn[:2]), query]
        if self.joins_system and system.strip():
            texts[0] = f"{system.strip()}\n\n{texts[0]}"
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        for message, turn in zip(messages[1::2], history, strict=True):
            if len(turn) > 2:
                message["reasoning_content"] = turn[2]
        return messages if self.joins_system else [{"role": "system", "content": system}, *messages]

    def write(self, folder: Path, small: bool = False, **sizes: Any) -> Path:
        """A checkpoint with random weights, in `folder`; `small` as in `tokenizer`."""
        torch.manual_seed(0)
        tokenizer = self.tokenizer(small)
        tokenizer.save_pretrained(folder)
        size = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, **TINY, **self.config, **sizes}
        if size["model_type"] == "chatglm":
            _write_chatglm(folder, size)
        else:
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**size))
            model.generation_config.eos_token_id = tokenizer.eos_token_id
            model.save_pretrained(folder)
        return folder


TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
}
GATED_DELTA_NET = {
    "model_type": "qwen3_5_text",
    "num_hidden_layers": 4,  # three of linear attention to one of full attention
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "mamba_ssm_dtype": "float32",
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}


def _qwen() -> Tokenizer:
    """Qwen's real vocabulary."""
    return qwen_tokenizer().backend_tokenizer


def _readmes() -> list[str]:
    return [(ROOT / name).read_text() for name in ("README.md", "README.zh-CN.md")]


def _bytes() -> Tokenizer:
    """Byte-level BPE, as Llama 3 has it."""
    vocabulary = Tokenizer(models.BPE())
    vocabulary.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    vocabulary.train_from_iterator(_readmes(), trainer)
    return vocabulary


def _pieces(metaspace: bool = False) -> Tokenizer:
    """BPE on characters that falls back to bytes, as SentencePiece makes it: with `metaspace` as Mistral has it, with
    a space before the prompt; else as Gemma and Yi do.
    """
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(_readmes(), trainers.BpeTrainer(vocab_size=1000, show_progress=False))
    first = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    known = trained.get_vocab()
    pieces = sorted(known, key=known.get)
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    ids = {piece: i for i, piece in enumerate(dict.fromkeys([*first, *pieces]))}
    vocabulary = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    strip = []
    if metaspace:
        vocabulary.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        strip = [decoders.Strip(" ", 1, 0)]
    else:
        vocabulary.normalizer = normalizers.Replace(" ", "▁")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    vocabulary.decoder = decoders.Sequence(parts)
    vocabulary.add_special_tokens(["<unk>"])
    return vocabulary


def _write_chatglm(folder: Path, size: dict[str, Any]) -> None:
    """ChatGLM3's network, which transformers does not have."""
    hidden, ffn, heads = size["hidden_size"], size["intermediate_size"], size["num_attention_heads"]
    vocabulary, layers = size["vocab_size"], size["num_hidden_layers"]
    config = {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "num_layers": layers,
        "padded_vocab_size": vocabulary,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "kv_channels": hidden // heads,
        "num_attention_heads": heads,
        "seq_length": CONTEXT,
        "add_qkv_bias": True,
        "multi_query_attention": True,
        "multi_query_group_num": 1,
        "original_rope": True,
        "tie_word_embeddings": False,
        "eos_token_id": size["eos_token_id"],
        "torch_dtype": "float32",
    }
    shapes = {
        "embedding.word_embeddings.weight": (vocabulary, hidden),
        "encoder.final_layernorm.weight": (hidden,),
        "output_layer.weight": (vocabulary, hidden),
    }
    qkv = hidden + 2 * hidden // heads
    for i in range(layers):
        shapes |= {
            f"encoder.layers.{i}.input_layernorm.weight": (hidden,),
            f"encoder.layers.{i}.self_attention.query_key_value.weight": (qkv, hidden),
            f"encoder.layers.{i}.self_attention.query_key_value.bias": (qkv,),
            f"encoder.layers.{i}.self_attention.dense.weight": (hidden, hidden),
            f"encoder.layers.{i}.post_attention_layernorm.weight": (hidden,),
            f"encoder.layers.{i}.mlp.dense_h_to_4h.weight": (2 * ffn, hidden),
            f"encoder.layers.{i}.mlp.dense_4h_to_h.weight": (hidden, ffn),
        }
    weights = {f"transformer.{name}": torch.randn(shape) * 0.2 for name, shape in shapes.items()}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(weights, folder / "model.safetensors")


QWEN_TOKENS = {"control": SPECIAL_TOKENS, "plain": (*PLAIN_TOKENS, "<tool_response>", "</tool_response>")}
LLAMA_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
GLM_TOKENS = ("[gMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "</s>")
MISTRAL_TOKENS = ("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
GEMMA_TOKENS = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
_qwen_family = partial(Family, vocabulary=_qwen, **QWEN_TOKENS, eos="<|im_end|>")
_llama = partial(Family, vocabulary=_bytes, control=LLAMA_TOKENS, bos=LLAMA_TOKENS[0], eos="<|eot_id|>")
_sentencepiece = partial(_pieces, metaspace=True)
_mistral = partial(Family, vocabulary=_sentencepiece, control=MISTRAL_TOKENS, bos="<s>", eos="</s>")
_gemma = partial(Family, vocabulary=_pieces, control=GEMMA_TOKENS, bos="<bos>", eos="<end_of_turn>")
FAMILIES = {
    "Qwen1.5": _qwen_family(CHATML, config={"model_type": "qwen2"}),
    "Qwen2": _qwen_family(CHATML.replace("assistant<|im_end|>", "assistant.<|im_end|>")),
    "Qwen2.5": _qwen_family(QWEN25_TEMPLATE, config={"model_type": "qwen2"}),
    "Qwen1.5-MoE": _qwen_family(
        CHATML, config={"model_type": "qwen2_moe", **EXPERTS, "shared_expert_intermediate_size": 64}
    ),
    "Qwen3": _qwen_family(QWEN3, config={"model_type": "qwen3"}),
    "Qwen3-MoE": _qwen_family(QWEN3, config={"model_type": "qwen3_moe", **EXPERTS}),
    "Qwen3.5": _qwen_family(QWEN35, config=GATED_DELTA_NET),
    "Qwen3.6": _qwen_family(QWEN36),
    "Qwen3.6 keeping": _qwen_family("{% set preserve_thinking = true %}" + QWEN36),
    "Qwen3.8": _qwen_family(QWEN38, config=GATED_DELTA_NET),
    "Qwen3.8 dropping": _qwen_family("{% set preserve_thinking = false %}" + QWEN38),
    "Qwen3.8 medium": _qwen_family("{% set reasoning_effort = reasoning_effort|default('medium') %}" + QWEN38),
    "DeepSeek-R1-Distill-Qwen": Family(
        DEEPSEEK,
        _qwen,
        control=(BOS, EOS),
        plain=("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
        bos=BOS,
        eos=EOS,
        config={"model_type": "qwen2"},
    ),
    "ChatGLM3": Family(CHATGLM3, _bytes, GLM_TOKENS, "</s>", config={"model_type": "chatglm"}),
    "Yi-1.5": Family(YI, _pieces, SPECIAL_TOKENS, "<|im_end|>", config={"model_type": "llama"}),
    "Llama 3": _llama(LLAMA3, config={"model_type": "llama"}),
    "Llama 3.1": _llama(LLAMA31),
    "Mistral 0.3": _mistral(MISTRAL3, config={"model_type": "mistral"}),
    "Mistral Large": _mistral(MISTRAL7),
    "Gemma 2": _gemma(GEMMA2, joins_system=True, config={"model_type": "gemma2", "tie_word_embeddings": True}),
    "Gemma 3": _gemma(GEMMA3),
}
"""Those with a `config` can be written as checkpoints."""
REFUSED = {
    "Mistral 0.1": Family(MISTRAL1, _sentencepiece, ("<s>", "</s>"), bos="<s>", eos="</s>"),
    "Vicuna": Family(VICUNA, _pieces, ("<s>", "</s>"), "</s>"),
}
"""Plain text stands between a user's text and the answer: a text could pass for a turn."""
PIECES = [
    "",
    " ",
    "\n",
    "\r\n\t",
    "\n\n  ",
    "\x00\x7f",
    "\u200b\ufeff",
    "你好，",
    "请用中文写一首诗：春天。",
    "１２３，３．１４",
    "👩‍👩‍👧‍👦",
    "🇨🇳❤️",
    "e\u0301\u0301",
    "שלום مرحبا",
    "The capital of France is Paris.",
    " 3.14159e-12",
    "1234567890",
    "def f(x):\n\treturn x if x < 3 else f(x - 1)\n",
    "```python\nprint('hi')\n```",
    '<div class="a">&amp;</div>',
    "| a | b |\n|---|---|\n",
    "system\n",
    "user",
    "assistant\n",
    "{{ messages }} {% raw %}",
    "⟦system⟧⟦query⟧",
    "<|im_",
    "INST]",
]
"""Texts that a tokenizer may stumble over."""


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """A small tokenizer of a family."""
    return {**FAMILIES, **REFUSED}[name].tokenizer(small=True)
