"""The one recipe that makes a model's folder ready to serve, online and offline."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_vllm.hardware import fill_in, graph_defaults
from qwen_vllm.models.adapters import check_adapters
from qwen_vllm.models.checks import ModelUnavailable, check_loadable, language_part_only, number_format
from qwen_vllm.models.tokenizer import tokenizer_as_written
from qwen_vllm.reasoning import parser_for_folder

LOG = logging.getLogger("vllm.qwen_vllm")


def prepare(
    args: Any, adapters: Mapping[str, str], chat_template: str | None, template_options: Mapping[str, Any]
) -> str | None:
    """Check what is to be loaded, complete `args`, and return the chat template's text.

    Args:
        args: `vllm.EngineArgs`, or a command line with the same names; `model` is a folder of `resolve_model`. Its
            `tokenizer`, `dtype`, `language_model_only`, `reasoning_parser` and what is open of its CUDA graphs are set.
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
    if not args.language_model_only and language_part_only(args.model):
        args.language_model_only = True
        LOG.warning("torchvision is not installed: %s takes no images", Path(args.model).name)
    if str((args.speculative_config or {}).get("method")).endswith("mtp") and args.enable_prefix_caching is not False:
        LOG.warning("MTP with prefix caching: texts can be wrong (vLLM issue 53912); add --no-enable-prefix-caching")
    fill_in(args, graph_defaults(args))
    folder = Path(args.tokenizer or args.model)
    template = read_chat_template(chat_template, folder)
    # The engine needs the parser too: it ends the reasoning when a request's budget of it is spent.
    args.reasoning_parser = args.reasoning_parser or parser_for_folder(
        folder, template, template_options, args.trust_remote_code
    )
    return template


def read_chat_template(template: str | None, folder: Path) -> str | None:
    """Return the Jinja text that `--chat-template` names: a file's, or the text itself.

    Without one, vLLM takes that of the model's processor, if it has one: chat_template.json, beside the tokenizer in
    `folder`. None: the tokenizer's own.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.renderers.chat_utils import load_chat_template

    of_processor = folder / "chat_template.json"
    replaced = template or (folder / "chat_template.jinja").is_file()
    if of_processor.is_file() and any(folder.glob("*processor_config.json")) and not replaced:
        text: str = json.loads(of_processor.read_bytes())["chat_template"]
        return text
    try:
        return load_chat_template(template)
    except VLLMValidationError as error:
        raise ModelUnavailable(f"--chat-template {template}: neither a file nor a Jinja template") from error
