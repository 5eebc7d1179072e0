"""Chats with a model in the terminal without a server, or answers a file of questions.

python vllm_offline.py --model Qwen/Qwen2.5-7B-Instruct
python vllm_offline.py --input rows.jsonl --output answers.jsonl
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from qwen_vllm import console
from qwen_vllm.cache import CACHE, open_log
from qwen_vllm.flags import Help, add_arguments, given_sampling
from qwen_vllm.hardware import set_environment
from qwen_vllm.models.checks import ModelUnavailable
from qwen_vllm.models.demo import DEMO_NAME
from qwen_vllm.models.hubs import HUBS
from qwen_vllm.models.resolve import resolve_model, resolve_parts
from qwen_vllm.offline.batch import Batch, BatchError
from qwen_vllm.protocol import (
    DEFAULT_SYSTEM,
    AskedTurn,
    ChatError,
    Part,
    Question,
    Sampling,
    ServerInfo,
    reason_of,
    text_turns,
)
from qwen_vllm.words import choose_language, say

if TYPE_CHECKING:
    from vllm_wrapper import ChatModel

LOG = CACHE / "offline.log"


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Parse our flags; return them and the rest, which is for vLLM's engine."""
    choose_language(argv)
    parser = argparse.ArgumentParser(
        prog="vllm_offline.py",
        description="Chat with a model without a server, or answer a file of rows.",
        epilog="Every other flag goes to vLLM's engine, such as --tensor-parallel-size 2 or --quantization gptq.",
        allow_abbrev=False,
        formatter_class=Help,
    )
    # Not `model`, which is the name of a server's adapter in the console's settings.
    parser.add_argument(
        "--model", "--model-path", dest="model_path", metavar="MODEL", help="folder or id; default: demo"
    )
    parser.add_argument("--hub", choices=HUBS, default="modelscope", help="where a model that is no folder comes from")
    parser.add_argument("--revision", help="branch, tag or commit of it there; asks the hub again")
    parser.add_argument("--download-dir", metavar="FOLDER", help="folder for what is downloaded")
    parser.add_argument(
        "--lora-modules", nargs="+", type=_adapter, default=[], metavar="NAME=FOLDER", help="LoRA adapters"
    )
    parser.add_argument("--chat-template", metavar="FILE", help="Jinja template in place of the model's own")
    parser.add_argument(
        "--default-chat-template-kwargs",
        type=_json_object,
        default={},
        metavar="JSON",
        help="""what the template is given too, such as '{"preserve_thinking": true}'""",
    )
    parser.add_argument("--verbose", action="store_true", help=say("show vLLM's log too, which goes to {log}", log=LOG))
    parser.add_argument("--prompt", metavar="TEXT", help="answer this, and leave")
    group = parser.add_argument_group("a file of rows")
    group.add_argument("--input", type=Path, metavar="FILE", help="JSONL to answer: a row has query or messages")
    group.add_argument("--output", type=Path, metavar="FILE", help="JSONL for the answers; run again to go on")
    group.add_argument("--ordered", action="store_true", help="at the end, put the answers into the order of the rows")
    group.add_argument("--reference", metavar="FIELD", help="the rows' field with the right answer, to score against")
    add_arguments(parser, [name for name in Sampling.model_fields if name != "model"])
    # As vLLM's own parser has it, --model_path is --model-path.
    given = sys.argv[1:] if argv is None else argv
    flags = [re.sub("^--[^=]+", lambda flag: flag.group().replace("_", "-"), text) for text in given]
    # None: it is not given. Where the default is typed, it is for rows in OpenAI's form too.
    args, engine_flags = parser.parse_known_args(flags, argparse.Namespace(system=None))
    if bool(args.input) != bool(args.output):
        parser.error(say("--input and --output go together"))
    if args.input and args.prompt is not None:
        parser.error(say("--prompt does not go with --input"))
    if (args.ordered or args.reference) and not args.input:
        parser.error(say("--ordered and --reference need --input"))
    return args, engine_flags


def _adapter(text: str) -> tuple[str, str]:
    name, _, folder = text.partition("=")
    if not (name and folder):
        raise argparse.ArgumentTypeError(say("has the form NAME=FOLDER"))
    return name, str(Path(os.path.expanduser(folder)))


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(say("must be a JSON object"))
    return value


def main(argv: list[str] | None = None) -> int:
    """Chat or answer a file; return the exit status."""
    args, engine_flags = parse_args(argv)
    load = partial(_load, args, engine_flags)
    try:
        sampling = given_sampling(args)
        if args.input:
            return _answer_file(args, sampling, load)
        if args.system is None:
            args.system = DEFAULT_SYSTEM
        model = load()
    except (ModelUnavailable, ChatError, BatchError) as error:
        print(f"vllm_offline.py: {error}", file=sys.stderr)
        return 1 if isinstance(error, ModelUnavailable) else 2
    except KeyboardInterrupt:
        return 130
    name = args.model_path or DEMO_NAME
    info = ServerInfo([name, *model.adapters], reasoning_efforts=model.reasoning_efforts)

    def ask(query: Question, history: Sequence[AskedTurn], system: str | None, sampling: Sampling) -> Iterator[Part]:
        return model.stream_chat(query.text, text_turns(history), system, sampling)

    if args.prompt is not None:
        return 0 if console.Chat(ask, args.system, sampling, 0, lambda: info).answer(args.prompt) else 1
    return console.run(ask, say("{model}, offline", model=name), args, lambda: info)


def _answer_file(args: argparse.Namespace, sampling: Sampling, load: Callable[[], "ChatModel"]) -> int:
    """Answer the rows of --input; return the exit status: 1 where a row has no answer."""
    with closing(Batch(args.input, args.output, args.reference)) as batch:
        try:
            batch.run(load, args.system, sampling)
            if args.ordered:
                batch.order()
        except KeyboardInterrupt:
            stopped = say("Stopped. What is done is in {file}: run the same again to go on", file=args.output)
            print(stopped, file=sys.stderr)
            return 130
        except (ChatError, OSError) as error:
            reason = f"{error.message} ({LOG})" if isinstance(error, ChatError) else f"{args.output}: {error.strerror}"
            kept = say("{reason}. What is done is kept: run the same again to go on", reason=reason)
            print(f"vllm_offline.py: {kept}", file=sys.stderr)
            return 1
        summary = batch.summary()
    figures = {name: value for name, value in summary.items() if name != "scores"} | summary.get("scores", {})
    print(" · ".join(f"{say(name).replace('_', ' ')} {value}" for name, value in figures.items()), file=sys.stderr)
    print(json.dumps(summary))
    return 1 if summary["failed"] else 0


def _load(args: argparse.Namespace, engine_flags: list[str]) -> "ChatModel":
    """Load the model that is asked for.

    Raises:
        ModelUnavailable: it cannot be had, or the engine cannot start.
    """
    # Outside of the log, where its progress shows.
    folder = resolve_model(args.model_path, args.hub, args.revision, args.download_dir)
    print(say("Loading {model} …", model=args.model_path or DEMO_NAME), file=sys.stderr, flush=True)
    try:
        log = open_log(LOG, args.verbose)
        with _output_to(log):
            engine_args = {"download_dir": args.download_dir, **_engine_args(engine_flags)}
        resolve_parts(engine_args, args.hub)
        with _output_to(log):
            from vllm_wrapper import ChatModel

            model = ChatModel(
                folder,
                chat_template=args.chat_template,
                chat_template_options=args.default_chat_template_kwargs,
                adapters=dict(args.lora_modules),
                **engine_args,
            )
    except ModelUnavailable:
        raise
    except SystemExit:
        print(LOG.read_text().strip().splitlines()[-1], file=sys.stderr)
        raise
    except Exception as error:
        raise ModelUnavailable(
            "the engine could not start: {reason}\nDetails: {log}", reason=reason_of(error), log=LOG
        ) from error
    if model.no_chat:
        raise ModelUnavailable(model.no_chat.message)
    return model


def _engine_args(flags: list[str]) -> dict[str, Any]:
    """Parse vLLM's own flags; return only what they name, by the names of `vllm.EngineArgs`."""
    set_environment()
    from vllm import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm_offline.py"))
    # argparse fills in a default only where the namespace has nothing yet.
    unset = object()
    namespace = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([])), unset))
    return {name: value for name, value in vars(parser.parse_args(flags, namespace)).items() if value is not unset}


@contextmanager
def _output_to(log: IO[str]) -> Iterator[None]:
    """Send all output of the block to a file, also that of child processes and of compiled code.

    Log handlers made in the block keep writing there.
    """
    kept = os.dup(1), os.dup(2)
    try:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        with redirect_stdout(log), redirect_stderr(log):
            yield
    finally:
        for number, copy in enumerate(kept, start=1):
            os.dup2(copy, number)
            os.close(copy)


if __name__ == "__main__":
    raise SystemExit(main())
