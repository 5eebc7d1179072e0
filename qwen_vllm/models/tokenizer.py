"""Has vLLM load a tokenizer as its tokenizer.json says.

Where transformers has a class of its own for a tokenizer, it takes only the vocabulary from the tokenizer.json. The
normalizer, the pre-tokenizer and the decoder are the class's. If the class is not that of the model, prompts become
other token ids than the model was trained on, and nothing says so.
It can go when a class takes the file's parts: transformers issue 48206 tells the same of Llama's.
"""

import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_vllm.cache import CACHE, fingerprint, made_once
from qwen_vllm.models.checks import ModelArgs, ModelUnavailable, read_json
from qwen_vllm.words import say

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PARTS = ("normalizer", "pre_tokenizer", "decoder")
MODEL_OPTIONS = (
    *("unk_token", "continuing_subword_prefix", "end_of_word_suffix"),
    *("fuse_unk", "byte_fallback", "ignore_merges"),
)


def tokenizer_as_written(args: ModelArgs) -> str | None:
    """Return what to give to vLLM as its `tokenizer`, so that it does what its tokenizer.json says.

    It is that of `args`; or, where transformers would read the file otherwise, a folder in the user's cache.

    Raises:
        ModelUnavailable: transformers would read it otherwise, and that cannot be mended here.
    """
    from tokenizers import Tokenizer

    folder = Path(args.tokenizer or args.model)
    if args.skip_tokenizer_init or not (folder / "tokenizer.json").is_file():
        return args.tokenizer
    try:
        written = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer = load_tokenizer(str(folder), args)
    except Exception:  # vLLM meets the same, and says it
        return args.tokenizer
    loaded, kind = getattr(tokenizer, "backend_tokenizer", None), type(tokenizer).__mro__[1]  # vLLM's own comes first
    if not isinstance(loaded, Tokenizer) or not kind.__module__.startswith("transformers."):
        return args.tokenizer  # a model's own code is taken at its word
    name, parts, added = kind.__name__, _parts(written), _added(written)
    if _parts(loaded) == parts and added <= _added(loaded):
        return args.tokenizer
    copy = CACHE / "tokenizers" / fingerprint(Path(__file__), *sorted(folder.iterdir())) / folder.resolve().name
    try:
        mended = load_tokenizer(str(made_once(copy, partial(_link, folder))), args).backend_tokenizer
    except OSError as error:
        raise ModelUnavailable("cannot write {file}: {reason}", file=copy, reason=error.strerror or error) from error
    if _parts(mended) != parts:
        raise ModelUnavailable(
            "the tokenizer in {folder} would be read otherwise than its tokenizer.json says, as {name}: name another "
            "with --tokenizer",
            folder=folder,
            name=name,
        )
    if _parts(loaded) == parts and _added(loaded) == _added(mended):
        return args.tokenizer  # it is tokenizer_config.json that says otherwise of added tokens
    told = say(
        "The tokenizer of {model} is loaded as its tokenizer.json says: {name}, which transformers would take for it, "
        "does otherwise.",
        model=folder.resolve().name,
        name=name,
    )
    print(told, file=sys.stderr, flush=True)
    return str(copy)


def load_tokenizer(folder: str, args: ModelArgs) -> Any:
    """Load a tokenizer as vLLM does; with these very arguments vLLM then finds it loaded in this process."""
    from vllm.tokenizers.registry import cached_get_tokenizer

    return cached_get_tokenizer(
        folder,
        runner_type="generate",
        tokenizer_mode=args.tokenizer_mode,
        revision=args.tokenizer_revision,
        trust_remote_code=args.trust_remote_code,
    )


def _parts(tokenizer: "Tokenizer") -> list[Any]:
    """Describe what decides on token ids and text, besides the vocabulary and the added tokens."""
    states = [part and part.__getstate__().decode() for part in (getattr(tokenizer, name) for name in PARTS)]
    normalizer, pre_tokenizer, decoder = (state or "" for state in states)
    # These options are written to the file, and change nothing here.
    pre_tokenizer = re.sub(r'"trim_offsets":\w+', "", pre_tokenizer)
    decoder = re.sub(r'"(add_prefix_space|trim_offsets|use_regex)":\w+', "", decoder)
    options = [getattr(tokenizer.model, name, None) or None for name in MODEL_OPTIONS]
    return [type(tokenizer.model), options, normalizer, pre_tokenizer, decoder]


def _added(tokenizer: "Tokenizer") -> set[tuple[int, str]]:
    return {(number, repr(token)) for number, token in tokenizer.get_added_tokens_decoder().items()}


def _link(source: Path, target: Path) -> None:
    """Link to all of `source`, but name the class that takes everything from tokenizer.json."""
    from transformers import __version__

    file = source / "tokenizer_config.json"
    described = read_json(file) if file.is_file() else {}
    described.pop("auto_map", None)
    # For some models transformers would look past the class. Without a version it warns of an error of Mistral's.
    config = {"model_type": "qwen3", "transformers_version": __version__}
    written = {file.name: {**described, "tokenizer_class": "PreTrainedTokenizerFast"}, "config.json": config}
    for name, content in written.items():
        (target / name).write_text(json.dumps(content, indent=2))
    for file in source.iterdir():
        if file.name not in written:
            (target / file.name).symlink_to(file.resolve())
