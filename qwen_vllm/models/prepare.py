"""The one recipe that makes a model's folder ready to serve, online and offline."""

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

from qwen_vllm.cache import CACHE
from qwen_vllm.hardware import (
    INT8_COPY,
    Default,
    cache_defaults,
    fill_in,
    graph_defaults,
    on_cpu,
    reads_int8,
    sharing_defaults,
)
from qwen_vllm.models.adapters import check_adapters
from qwen_vllm.models.checks import (
    ModelUnavailable,
    check_loadable,
    language_part_only,
    number_format,
    read_config,
    read_json,
    weight_files,
)
from qwen_vllm.models.demo import DEMO_NAME
from qwen_vllm.models.tokenizer import load_tokenizer, tokenizer_as_written
from qwen_vllm.reasoning import parser_for
from qwen_vllm.tool_calls import JSON_CALLS, XML_CALLS, tool_parser_for

TOOL_REASONS = {
    JSON_CALLS: "the chat template writes tool calls as JSON",
    XML_CALLS: "the chat template writes tool calls as XML",
    "": "the chat template writes no tool calls, or in a form of its own: vLLM may have a parser for it",
}
OUR_GRAMMARS = ("guidance", "auto")
"""Engines of --structured-outputs-config that take the grammars of our parsers."""
VLLMS = {JSON_CALLS: "hermes", XML_CALLS: "qwen3_xml"}
"""vLLM's own parsers of the same calls, for the other engines."""
STATES_OF_A_REQUEST = 2
"""Of a layer of linear attention: vLLM rounds them up to whole blocks of the KV cache."""
LOG = logging.getLogger("vllm.qwen_vllm")


def prepare(
    args: Any, adapters: Mapping[str, str], chat_template: str | None, template_options: Mapping[str, Any]
) -> str | None:
    """Check what is to be loaded, complete `args`, and return the chat template's text.

    Args:
        args: `vllm.EngineArgs`, or a command line with the same names; `model` is a folder of `resolve_model`. Its
            `tokenizer`, `dtype`, `language_model_only`, `reasoning_parser`, `override_generation_config`,
            `enable_prefix_caching` beside MTP and what is open of its CUDA graphs are set.
        adapters: folders of LoRA adapters by their names.
        chat_template: a file with a Jinja template that replaces the model's own, or its text.
        template_options: what the template is given beside the messages.

    Raises:
        ModelUnavailable: the model, an adapter or the template cannot be used.
    """
    check_loadable(args)
    check_adapters(adapters, args)
    args.tokenizer = tokenizer_as_written(args)
    args.dtype = number_format(args)
    args.override_generation_config = {**_greedy_as_written(args), **args.override_generation_config}
    if not args.language_model_only and language_part_only(args.model):
        args.language_model_only = True
        LOG.warning("torchvision is not installed: %s takes no images", Path(args.model).name)
    if _guesses(args):
        _without_prefix_cache(args)
    fill_in(args, [*graph_defaults(args), *cache_default(args), *quantization_default(args)])
    folder = Path(args.tokenizer or args.model)
    template = read_chat_template(chat_template, folder)
    # The engine needs the parser too: it ends the reasoning when a request's budget of it is spent.
    args.reasoning_parser = args.reasoning_parser or _chosen(parser_for, args, template, template_options)
    return template


def cache_default(args: Any) -> list[Default]:
    """Choose the size of the KV cache for the model, the context and the dtype of `args`; see `hardware`."""
    config = read_config(args.model)
    config = config.get("text_config") or config
    trained = config.get("max_position_embeddings") or 0
    context = args.max_model_len if (args.max_model_len or -1) > 0 else trained  # -1: as long as fits
    heads = config.get("num_key_value_heads") or config.get("num_attention_heads") or 0
    size = config.get("head_dim") or config.get("hidden_size", 0) // (config.get("num_attention_heads") or 1)
    kinds = config.get("layer_types") or ["full_attention"] * config.get("num_hidden_layers", 0)
    guesses = _guesses(args)
    layers = kinds.count("full_attention") + bool(guesses)  # the MTP layer is one
    token_bytes = 2 * layers * heads * size * (4 if args.dtype == "float32" else 2)
    names = ("linear_num_value_heads", "linear_value_head_dim", "linear_key_head_dim")
    state_bytes = 4 * prod(config.get(name) or 0 for name in names)
    states = STATES_OF_A_REQUEST * (1 + guesses) * kinds.count("linear_attention")
    return cache_defaults(context, token_bytes, states * state_bytes)


def _guesses(args: Any) -> int:
    """Count the tokens that the model's MTP layer guesses at once; 0: it does not."""
    speculation = args.speculative_config or {}
    return (speculation.get("num_speculative_tokens") or 1) if str(speculation.get("method")).endswith("mtp") else 0


def _without_prefix_cache(args: Any) -> None:
    """Do without the prefix cache beside MTP, unless the user wants both and the machine can do both.

    Raises:
        ModelUnavailable: it cannot.
    """
    if args.enable_prefix_caching is None:
        args.enable_prefix_caching = False
        LOG.warning("MTP: the prefix cache is off, as texts can be wrong with both (vLLM issue 53912)")
    elif args.enable_prefix_caching and on_cpu():
        raise ModelUnavailable("MTP with the prefix cache does not run on a CPU: leave out --enable-prefix-caching")
    elif args.enable_prefix_caching:
        LOG.warning("MTP with prefix caching: texts can be wrong (vLLM issue 53912); add --no-enable-prefix-caching")


def sharing_default(args: Any) -> list[Default]:
    """Choose two engines on one GPU where the weights of `args.model`, a folder that was checked, are small enough."""
    dummy = args.load_format == "dummy"
    return sharing_defaults(args, 0 if dummy else sum(file.stat().st_size for file in weight_files(Path(args.model))))


def quantization_default(args: Any) -> list[Default]:
    """Choose a copy in int8 for the demo model, whose weights had 4 bits before, where that is quicker."""
    if args.model != str(CACHE / DEMO_NAME) or args.dtype not in ("auto", "bfloat16") or not reads_int8():
        return []
    return [Default("quantization", INT8_COPY, "one stream of the demo model is quicker; --dtype float32: off")]


def tool_default(args: Any) -> Default:
    """Choose the parser of tool calls for the model of the server's command line `args`.

    Raises:
        ModelUnavailable: the template cannot be read.
    """
    template = read_chat_template(args.chat_template)
    parser = _chosen(tool_parser_for, args, template, args.default_chat_template_kwargs or {})
    backend = args.structured_outputs_config.backend
    if parser and backend not in OUR_GRAMMARS:
        return Default("tool_call_parser", VLLMS[parser], f"vLLM's own: {backend} cannot read the grammars of ours")
    return Default("tool_call_parser", parser or None, TOOL_REASONS[parser])


def _chosen(choose: Callable[..., str], args: Any, *template: Any) -> str:
    """Choose a parser by the tokenizer and its template; empty where the tokenizer cannot be loaded: vLLM says why."""
    tokenizer = None
    if not args.skip_tokenizer_init:
        with suppress(Exception):
            tokenizer = load_tokenizer(args.tokenizer or args.model, args)
    return choose(tokenizer, *template) if tokenizer is not None else ""


def _greedy_as_written(args: Any) -> dict[str, Any]:
    """Return a temperature of 0 where generation_config.json has `do_sample: false` alone: vLLM would sample."""
    source = args.model if args.generation_config == "auto" else args.generation_config
    file = Path(source) / "generation_config.json"
    written = {**(read_json(file) if file.is_file() else {}), **args.override_generation_config}
    return {"temperature": 0.0} if written.get("do_sample") is False and written.get("temperature") is None else {}


def read_chat_template(template: str | None, folder: Path | None = None) -> str | None:
    """Return the Jinja text that `--chat-template` names: a file's, or the text itself.

    Without one, vLLM takes that of the model's processor, if it has one: chat_template.json, beside the tokenizer in
    `folder`; but not for a request with tools. None: the tokenizer's own.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.renderers.chat_utils import load_chat_template

    if folder and not (template or (folder / "chat_template.jinja").is_file()):
        of_processor = folder / "chat_template.json"
        if of_processor.is_file() and any(folder.glob("*processor_config.json")):
            written = read_json(of_processor)
            if not isinstance(written, dict) or not isinstance(text := written.get("chat_template"), str):
                raise ModelUnavailable(
                    "{file} is not one template, as vLLM needs it: pass --chat-template FILE", file=of_processor
                )
            return text
    try:
        return load_chat_template(template)
    except VLLMValidationError as error:
        raise ModelUnavailable("--chat-template {text}: neither a file nor a Jinja template", text=template) from error
