"""From a model's name to its folder.

A model is a local folder, an id on a hub (ModelScope unless told otherwise), or by default the demo model.
"""

import errno
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from qwen_vllm.cache import CACHE, made_once
from qwen_vllm.models import qwen_v1
from qwen_vllm.models.checks import ModelUnavailable, checked_config
from qwen_vllm.models.demo import DEMO_NAME, demo_model
from qwen_vllm.protocol import reason_of

HUBS = ("modelscope", "huggingface")


def resolve_model(name: str | None, hub: str = "modelscope") -> str:
    """Return the folder that holds model `name`; None: the demo model.

    A model that is no local folder is fetched from `hub`. For a first-generation Qwen the folder is one in the user's
    cache, which describes the model to vLLM and links to its weights.

    Raises:
        ModelUnavailable: no such folder, no network, no such model, no room on the disk.
    """
    try:
        if name is None:
            return str(demo_model())
        folder = Path(name).expanduser()
        if folder.is_dir():
            return str(_servable(folder))
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise ModelUnavailable(f"{name} is neither a folder nor a model id such as Qwen/Qwen2.5-7B-Instruct")
        return str(_servable(Path(_download(name, hub))))
    except OSError as error:
        raise ModelUnavailable(f"cannot prepare {name or DEMO_NAME}: {error.strerror or error}; run again") from error


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
    print(
        f"{target.name} is first-generation Qwen: served as a Qwen2 with its trained context of {config['seq_length']} "
        "tokens; the code that it brings is not run.",
        file=sys.stderr,
        flush=True,
    )
    return target


def _download(name: str, hub: str) -> str:
    """Fetch what is not there yet of a model into its hub's usual cache, with a progress bar."""
    snapshot_download = import_module("huggingface_hub" if hub == "huggingface" else "modelscope").snapshot_download
    print(f"Fetching {name} from {hub} …", file=sys.stderr, flush=True)
    try:
        return snapshot_download(name)
    except Exception as failure:
        if getattr(failure, "errno", None) == errno.ENOSPC:
            raise
        with suppress(Exception):
            folder = snapshot_download(name, local_files_only=True)
            if any(Path(folder).glob("*.safetensors")) or any(Path(folder).glob("*.bin")):
                checked_config(Path(folder))
                print(f"{hub} cannot be reached: using the copy of {name} fetched before.", file=sys.stderr)
                return folder
        raise ModelUnavailable(
            f"{name} is not in the local cache and could not be fetched from {hub} ({reason_of(failure)}): check the "
            "name and the network, pass a local folder, or choose another --hub"
        ) from failure
