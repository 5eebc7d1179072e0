"""From a model's name to its folder.

A model is a local folder, an id on a hub (ModelScope unless told otherwise), or by default the demo model.
"""

import os
import re
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from qwen_vllm.cache import CACHE, made_once
from qwen_vllm.models import qwen_v1
from qwen_vllm.models.checks import ModelUnavailable, checked_config
from qwen_vllm.models.demo import DEMO_NAME, demo_model
from qwen_vllm.models.download import fetch
from qwen_vllm.words import say


def resolve_model(
    name: str | None, hub: str = "modelscope", revision: str | None = None, cache: str | None = None
) -> str:
    """Return the folder that holds model `name`; None: the demo model.

    A model that is no local folder is fetched from `hub`. For a first-generation Qwen the folder is one in the user's
    cache, which describes the model to vLLM and links to its weights.

    Args:
        revision: a branch, a tag or a commit of the hub, which is then asked even where a whole copy is there.
        cache: the folder for what is fetched; None: the hub's usual cache.

    Raises:
        ModelUnavailable: no such folder, no network, no such model, no room on the disk.
    """
    try:
        if name is None:
            return str(demo_model())
        folder = Path(os.path.expanduser(name))  # ~NAME stays where there is no such user
        if folder.is_dir():
            return str(_servable(folder))
        if not _is_id(name):
            raise ModelUnavailable(
                "{name} is neither a folder nor a model id such as Qwen/Qwen2.5-7B-Instruct", name=name
            )
        return str(_servable(fetch(name, hub, revision, cache)))
    except OSError as error:
        reason = error.strerror or error
        raise ModelUnavailable(
            "cannot prepare {model}: {reason}; run again", model=name or DEMO_NAME, reason=reason
        ) from error


def resolve_parts(args: MutableMapping[str, Any], hub: str) -> None:
    """Fetch the tokenizer and the speculative model that `vllm.EngineArgs` name by an id; put in their folders.

    Raises:
        ModelUnavailable: as in `resolve_model`.
    """
    cache, tokenizer, speculative = args.get("download_dir"), args.get("tokenizer"), args.get("speculative_config")
    if tokenizer and _is_id(tokenizer):
        args["tokenizer"] = str(fetch(tokenizer, hub, args.get("tokenizer_revision"), cache, with_weights=False))
    if speculative and _is_id(speculative.get("model") or ""):
        folder = fetch(speculative["model"], hub, speculative.get("revision"), cache)
        args["speculative_config"] = {**speculative, "model": str(folder)}


def _is_id(name: str) -> bool:
    return bool(re.fullmatch("[^/.~][^/]*/[^/]+", name)) and not Path(name).exists()


def _servable(folder: Path) -> Path:
    """Return the folder to give to vLLM for the checkpoint in `folder`."""
    config = checked_config(folder)
    if qwen_v1.ARCHITECTURE not in (config.get("architectures") or []):
        return folder
    # The last part is the name that clients see.
    target = CACHE / "first-generation" / qwen_v1.fingerprint(folder) / folder.resolve().name
    try:
        made_once(target, lambda unfinished: qwen_v1.describe(folder, config, unfinished))
    except ValueError as error:
        raise ModelUnavailable(f"{folder} {error}") from None
    told = say(
        "{model} is first-generation Qwen: served as a Qwen2 with its trained context of {context} tokens; the code "
        "that it brings is not run.",
        model=target.name,
        context=config["seq_length"],
    )
    print(told, file=sys.stderr, flush=True)
    return target
