"""The server: vLLM's own, with our defaults and one more endpoint, POST /chat.

`python vllm_server.py` resolves the model, fills in defaults and starts `vllm serve`, which loads our endpoint plugin,
`qwen_vllm/server/endpoint.py`, in every front-end process. vLLM gives the OpenAI routes and all its flags.
"""

import gc
import os
import signal
import sqlite3
import sys
from argparse import Namespace
from importlib.metadata import entry_points
from pathlib import Path

from qwen_vllm import hardware
from qwen_vllm.cache import STATE
from qwen_vllm.models.checks import ModelUnavailable
from qwen_vllm.models.hubs import HUBS
from qwen_vllm.models.prepare import (
    OUR_GRAMMARS,
    cache_default,
    prepare,
    quantization_default,
    sharing_default,
    tool_default,
)
from qwen_vllm.models.resolve import resolve_model, resolve_parts
from qwen_vllm.network import THIS_MACHINE, listen
from qwen_vllm.protocol import reason_of
from qwen_vllm.server.guard import Guard, wants_key
from qwen_vllm.server.headless import end_with_head
from qwen_vllm.server.keys import KeyFileError, KeyRing
from qwen_vllm.server.usage import UsageFile
from qwen_vllm.tool_calls import FORMS
from qwen_vllm.vllm_plugin import early, patches, plugin
from qwen_vllm.vllm_plugin.engines import SLEEP_AFTER
from qwen_vllm.vllm_plugin.rendering import ALLOW
from qwen_vllm.words import WORDS, choose_language, say

LIMITS = (
    (
        "--max-body-size",
        int,
        None,
        "largest body of a request in bytes; default: 1 MiB, 16 bytes for each token of context, and 32 MiB for images",
    ),
    ("--header-timeout", float, 10.0, "seconds in which the head of a request must have come"),
    ("--body-timeout", float, 30.0, "seconds in which its body must have come"),
    ("--write-timeout", float, 30.0, "seconds after which a client that takes nothing is cut off"),
    ("--sleep-after", float, 0.0, "minutes without a request after which the GPU's memory is given back; 0: never"),
    ("--stall-timeout", float, 300.0, "seconds that one step of the engine may take before the server ends; 0: any"),
)

TOOLS_UNKNOWN = "by the chat template, once the model is here"


def parse_args(argv: list[str] | None = None) -> Namespace:
    """Parse every flag of `vllm serve`, with our defaults, and --model_path as another name for --model."""
    from vllm.config import StructuredOutputsConfig
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(
        FlexibleArgumentParser(
            prog="vllm_server.py",
            description=say("Serves a chat model: POST /chat and the OpenAI API. Takes every flag of `vllm serve`."),
        )
    )
    parser.add_argument("--model-path", dest="model", help=say("another name for --model"))
    parser.add_argument(
        "--hub", choices=HUBS, default="modelscope", help=say("where a model that is no folder comes from")
    )
    parser.add_argument("--lang", choices=tuple(WORDS), help=say("language (default: $QWEN_LANG or the locale's)"))
    for flag, kind, default, text in LIMITS:
        shown = "" if default is None else say(" (default: {default})", default=default)
        parser.add_argument(flag, type=kind, default=default, help=f"{say(text)}{shown}")
    parser.add_argument("--key-file", help=say("keys with names and limits, a TOML file: see docs/team.md"))
    parser.add_argument(
        "--usage-file", default=str(STATE / "usage.db"), help=say("where --key-file counts what each key uses")
    )
    parser.add_argument(
        "--allow-control-tokens",
        action="store_true",
        help=say("on /v1, take control tokens that messages and tools spell as such, as vLLM does"),
    )
    parser.add_argument(
        "--show-defaults", action="store_true", help=say("print what is chosen for this hardware, and why, and end")
    )
    parser.set_defaults(
        # The one of vLLM's grammar engines that bounds its own work: a pattern can occupy others for ever.
        structured_outputs_config=StructuredOutputsConfig(backend="guidance"),
        # vLLM would fetch media from any address that a request names; it quotes this list where it refuses.
        allowed_media_domains=["none, unless --allowed-media-domains names some"],
        # vLLM would take 999 of each in one request.
        limit_mm_per_prompt={"image": 16, "video": 1, "audio": 1},
        model=None,
        enable_auto_tool_choice=None,
        host="127.0.0.1",
        sse_keep_alive_interval=15,
        h11_max_incomplete_event_size=2**16,
        h11_max_header_count=100,
        # Open, so that what the user says can be told from vLLM's own defaults.
        data_parallel_size=None,
        gpu_memory_utilization=None,
        **hardware.values(hardware.engine_defaults()),
    )
    args = parser.parse_args(argv)
    if args.sleep_after:
        _prepare_sleep(args)
    name = args.model_tag or args.model
    is_folder = bool(name) and Path(os.path.expanduser(name)).is_dir()
    if args.show_defaults:
        args.model = os.path.expanduser(name) if is_folder else ""
        chosen = _choose(args)
        of_model = [hardware.Default("tool_call_parser", None, TOOLS_UNKNOWN)]
        if is_folder:
            of_model = [*cache_default(args), *quantization_default(args), tool_default(args)]
        hardware.fill_in(args, of_model)
        print(hardware.table(args, [*hardware.environment_defaults(), *chosen, *of_model]))
        sys.exit()
    if not (args.uds or args.headless):
        listen("vllm_server.py", args.host or "", args.port).close()  # before anything is fetched or loaded
    if args.key_file:
        _check_team(args)
    args.middleware = [*args.middleware, f"{Guard.__module__}.{Guard.__name__}"]
    args.model = args.model_tag = resolve_model(name, args.hub, args.revision, args.download_dir)
    resolve_parts(vars(args), args.hub)
    _choose(args)
    if args.key_file:
        # The queue is the front ends', where its places belong to keys.
        args.queue_bound, args.max_num_queued_reqs = args.max_num_queued_reqs, None
        args.scheduling_policy = "priority"
    # The name that clients see: an id as it is, of a folder no more than its last part.
    shown = name if name and not is_folder else Path(args.model).resolve().name
    args.served_model_name = args.served_model_name or [shown]
    prepare(args, _adapters(args), args.chat_template, args.default_chat_template_kwargs or {})
    if args.enable_auto_tool_choice is not False:
        hardware.fill_in(args, [tool_default(args)])
        args.enable_auto_tool_choice = bool(args.tool_call_parser)
    backend = args.structured_outputs_config.backend
    if args.tool_call_parser in FORMS and (args.tool_strict_level != "auto" or backend not in OUR_GRAMMARS):
        flag = "--tool-strict-level" if backend in OUR_GRAMMARS else f"the grammar engine {backend}"
        raise ModelUnavailable(
            "{flag} does not go with --tool-call-parser {parser}: for vLLM's own parser name none, "
            """with --structured-outputs-config '{{"backend": "xgrammar"}}'""",
            flag=flag,
            parser=args.tool_call_parser,
        )
    validate_parsed_serve_args(args)
    return args


def _choose(args: Namespace) -> list[hardware.Default]:
    """Fill in what depends on the hardware and on the weights of `args.model`; empty: the model is not known."""
    sharing = sharing_default(args) if args.model else []
    hardware.fill_in(args, sharing)
    args.data_parallel_size = args.data_parallel_size or 1
    args.gpu_memory_utilization = args.gpu_memory_utilization or hardware.GPU_SHARE
    chosen = [*hardware.engine_defaults(), *sharing, *hardware.graph_defaults(args), *hardware.server_defaults(args)]
    hardware.fill_in(args, chosen)
    return chosen


def _prepare_sleep(args: Namespace) -> None:
    """Make the engines able to sleep; they read from their environment when."""
    if hardware.on_cpu():
        raise ModelUnavailable("--sleep-after gives back a GPU's memory: on a CPU there is none, leave it away")
    args.enable_sleep_mode = True
    os.environ[SLEEP_AFTER] = str(args.sleep_after)


def _check_team(args: Namespace) -> None:
    """Check the key file and the usage file."""
    if args.api_key or os.environ.get("VLLM_API_KEY"):
        raise ModelUnavailable("--key-file has all keys: leave --api-key and VLLM_API_KEY away")
    args.key_file, args.usage_file = (
        os.path.abspath(os.path.expanduser(file)) for file in (args.key_file, args.usage_file)
    )
    args.server_id = os.urandom(8).hex()
    try:
        KeyRing(Path(args.key_file))
        UsageFile(Path(args.usage_file), args.server_id).close()
    except KeyFileError as error:
        raise ModelUnavailable(str(error)) from None
    except (OSError, sqlite3.Error) as error:
        file = f"--usage-file {args.usage_file}"
        raise ModelUnavailable("cannot write {file}: {reason}", file=file, reason=reason_of(error)) from None


def _adapters(args: Namespace) -> dict[str, str]:
    """Return the folders of --lora-modules by their names, which must differ from the model's."""
    modules = args.lora_modules or []
    if modules and not args.enable_lora:
        raise ModelUnavailable("--lora-modules needs --enable-lora")
    for module in modules:
        module.path = os.path.expanduser(module.path)
    names = [*args.served_model_name, *(module.name for module in modules)]
    if len(set(names)) < len(names):
        raise ModelUnavailable(
            "two of these have the same name: {names}; choose others in --lora-modules", names=", ".join(names)
        )
    return {module.name: module.path for module in modules}


def main(argv: list[str] | None = None) -> None:
    """Start the server, and return when it has stopped."""
    choose_language(argv)
    # Until the server listens: end in order, leaving no half-made model and no engine behind.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    if not plugin.is_installed():
        told = say("it is not installed here yet: run `make setup`, or `pip install --no-deps -e .`")
        sys.exit(f"vllm_server.py: {told}")
    hardware.set_environment()
    forks = early.is_possible()
    if forks:
        early.begin()
    gc.disable()  # what is imported stays: to look for garbage among it takes a tenth of the time
    from vllm import envs
    from vllm.entrypoints.cli import serve
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args

    os.environ["VLLM_PLUGINS"] = ",".join([*_other_plugins(envs.VLLM_PLUGINS), plugin.NAME])
    plugin.begin_ours()
    patches.SIGNALS.apply()
    if forks:
        patches.EARLY_PROCESSES.apply()
    cli_env_setup()
    try:
        args = parse_args(argv)
    except ModelUnavailable as error:
        sys.exit(f"vllm_server.py: {error}")
    if args.allow_control_tokens:
        os.environ[ALLOW] = "1"
    configure_logging_from_args(args)
    if args.host not in THIS_MACHINE and not wants_key(args):
        host, flag = args.host or say("all addresses"), "--api-key"
        warning = say("Warning: {host} can be reached from other machines, and no {flag} is set.", host=host, flag=flag)
        print(warning, file=sys.stderr)
    if args.key_file:
        # The front ends look at the file each second; one that is this process takes the signal itself.
        signal.signal(signal.SIGHUP, lambda *_: None)
    gc.freeze()
    gc.enable()
    try:
        if args.headless:
            end_with_head(args)
        serve.ServeSubcommand.cmd(args)
    except Exception as error:
        sys.exit(f"vllm_server.py: {say('the server could not go on: {reason}', reason=reason_of(error))}")
    if args.headless:
        sys.exit("vllm_server.py: the engine of this machine has ended; the log above says why")


def _other_plugins(allowed: list[str] | None) -> list[str]:
    """List the plugins that vLLM would load without ours: naming one shuts out all that are not named."""
    if allowed is not None:
        return allowed
    groups = ("general", "platform", "io_processor", "stat_logger")
    return sorted({plugin.name for group in groups for plugin in entry_points(group=f"vllm.{group}_plugins")})


if __name__ == "__main__":
    main()
