"""Chats with a model in the terminal without a server.

python vllm_offline.py --model Qwen/Qwen2.5-7B-Instruct
"""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import console
from model_utils import CACHE, DEMO_NAME, HUBS, ModelUnavailable, engine_defaults, resolve_model, set_environment
from protocol import ChatError, Sampling

LOG = CACHE / "offline.log"


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our flags, and the rest, which is for vLLM's engine."""
    parser = argparse.ArgumentParser(
        prog="vllm_offline.py",
        description="Chat with a model without a server.",
        epilog="Every other flag goes to vLLM's engine, such as --tensor-parallel-size 2 or --quantization gptq.",
        allow_abbrev=False,
    )
    # Not `model`, which is the name of a server's adapter in the console's settings.
    parser.add_argument(
        "--model",
        "--model-path",
        "--model_path",
        dest="model_path",
        metavar="MODEL",
        help="folder or id; default: demo",
    )
    parser.add_argument("--hub", choices=HUBS, default="modelscope", help="where a model that is no folder comes from")
    parser.add_argument("--verbose", action="store_true", help=f"show vLLM's log too, which goes to {LOG}")
    console.add_arguments(parser, [name for name in Sampling.model_fields if name != "model"])
    return parser.parse_known_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The offline chat; returns the exit status."""
    args, engine_flags = parse_args(argv)
    name = args.model_path or DEMO_NAME
    try:
        folder = resolve_model(args.model_path, args.hub)
        print(f"Loading {name} …", file=sys.stderr, flush=True)
        with _output_to(LOG, args.verbose):
            from vllm_wrapper import ChatModel

            model = ChatModel(**_engine_args(folder, engine_flags))
    except (ModelUnavailable, ChatError) as error:
        print(f"vllm_offline.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except SystemExit:
        print(LOG.read_text().strip().splitlines()[-1], file=sys.stderr)
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1][:300]
        print(f"vllm_offline.py: the engine could not start: {reason}\nDetails: {LOG}", file=sys.stderr)
        return 1
    return console.run(model.stream_chat, f"{name}, offline", args)


def _engine_args(folder: str, flags: list[str]) -> dict[str, object]:
    """What vLLM's own flags ask of the engine, by the names of `vllm.EngineArgs`, over our defaults."""
    set_environment()
    from vllm import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm_offline.py"))
    parser.set_defaults(model=folder, **engine_defaults())
    return vars(EngineArgs.from_cli_args(parser.parse_args(flags)))


@contextmanager
def _output_to(path: Path, shown: bool) -> Iterator[None]:
    """Sends all output of the block to a file, that of child processes and of compiled code too; `shown`: it stays
    visible. Log handlers made in the block keep writing there.
    """
    log = console.open_log(path, shown)
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
