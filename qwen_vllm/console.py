"""The chat in a terminal that the client and the offline program share: line editing, commands, rendering, Ctrl-C.

It is handed a function that answers a question piece by piece, and knows nothing of how that is done.
"""

import argparse
import base64
import json
import os
import re
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Annotated

from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from pydantic import StringConstraints, TypeAdapter

from qwen_vllm.protocol import (
    DEFAULT_SYSTEM,
    AskedTurn,
    ChatError,
    ChatRequest,
    ChatResult,
    Part,
    Question,
    Reasoning,
    Sampling,
    ServerInfo,
    retry_delay,
    validated,
)

Ask = Callable[[Question, Sequence[AskedTurn], str, Sampling], Iterator[Part]]
"""(query, history, system, sampling) → pieces of thoughts and of text, then one ChatResult; raises ChatError."""

LINE_HISTORY = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "qwen-vllm" / "lines"
IMAGE = re.compile(
    rb"(?P<png>\x89PNG\r\n\x1a\n)|(?P<jpeg>\xff\xd8\xff)|(?P<webp>RIFF.{4}WEBP)|(?P<gif>GIF8[79]a)", re.DOTALL
)
ImageURL = Annotated[str, StringConstraints(pattern="^data:image/")]
HELP = """\
/help                this list
/clear               start a new conversation
/system [TEXT]       show or set the system prompt
/history             show the conversation
/set [NAME VALUE]    show or set a sampling parameter; without VALUE: back to the default
/model [NAME]        show which models there are, or choose one (a LoRA adapter)
/image [FILE]        attach an image to the next question, or list what is attached
/regen               answer the last question again
/save FILE           write the conversation to a file
/load FILE           go on with a saved conversation
/exit                leave (or Ctrl-D)
Enter sends, Alt-Enter breaks the line, Ctrl-C stops the answer."""


def add_arguments(parser: argparse.ArgumentParser, sampling: Iterable[str] = tuple(Sampling.model_fields)) -> None:
    """The flags that both terminals take: the conversation's and one for each parameter named in `sampling`."""
    parser.add_argument(
        "--history-max", type=_count, default=5, metavar="N", help="earlier turns sent along; 0: none (default: 5)"
    )
    parser.add_argument("--system", default=DEFAULT_SYSTEM, help="system prompt (default: %(default)r)")
    group = parser.add_argument_group("sampling (default: the model's)")
    for name in sampling:
        flag, text = f"--{name.replace('_', '-')}", Sampling.model_fields[name].description
        if name == "stop":
            group.add_argument(flag, action="append", metavar="WORD", help=f"{text}; repeatable")
        elif name == "enable_thinking":
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            group.add_argument(flag, metavar="X", help=text)


def run(ask: Ask, title: str, args: argparse.Namespace, info: Callable[[], ServerInfo]) -> int:
    """Chats until the user leaves: in a terminal with editing and commands, on a pipe a question a line.

    `info` tells what answers: its models, and whether it takes images.

    Returns the exit status: 1 where a question from a pipe got no answer.
    """
    try:
        sampling = given_sampling(args)
    except ChatError as error:
        print(error.message, file=sys.stderr)
        return 2
    chat = Chat(ask, args.system, sampling, args.history_max, info)
    if not sys.stdin.isatty():
        return 0 if all([chat.answer(line.strip()) for line in sys.stdin if line.strip()]) else 1
    chat.dim(f"{title}\n/help lists the commands, Ctrl-D leaves.")
    session = _session()
    while True:
        try:
            line = session.prompt("> ").strip()
            if line == "/exit":
                return 0
            if line.startswith("/"):
                chat.command(line)
            elif line:
                chat.answer(line)
        except KeyboardInterrupt:
            continue
        except EOFError:
            return 0


class Chat:
    """One conversation: its turns, its settings and its commands. A failed turn changes nothing."""

    def __init__(
        self, ask: Ask, system: str, sampling: Sampling, history_max: int, info: Callable[[], ServerInfo]
    ) -> None:
        self.ask, self.system, self.settings, self.history_max = ask, system, sampling, history_max
        self.info = info
        self.history: list[AskedTurn] = []
        self.attached: dict[str, str] = {}
        """What goes along with the next question: images as data URLs, by the paths of their files."""
        self.to_terminal = sys.stdout.isatty()

    def answer(self, query: str) -> bool:
        """Asks, prints the answer as it comes, and keeps the turn; Ctrl-C keeps what has arrived."""
        if asked_first := not isinstance(query, Question):
            query = Question(query, list(self.attached.values()))
        began, first, thinking, pieces, result = time.monotonic(), None, False, [], None
        parts = self._ask_until_answered(query, self._earlier())
        try:
            for part in parts:
                if isinstance(part, ChatResult):
                    result = part
                    continue
                first = first or time.monotonic()
                if isinstance(part, Reasoning):
                    thinking = self.dim(part.text, end="")
                else:
                    print("\n\n" * (thinking and not pieces), end="")
                    pieces.append(part)
                    print(self._shown(part), end="", flush=True)
        except KeyboardInterrupt:
            pass
        except ChatError as error:
            print("\n" * bool(thinking or pieces), end="", flush=True)
            print(self._shown(f"Error: {error.message}"), file=sys.stderr, flush=True)
            return False
        finally:
            parts.close()
        print(flush=True)
        if result:
            self.dim(figures_line(result, began, first or time.monotonic()))
        else:
            self.dim("stopped")
        if pieces or result:
            self.history.append((query, "".join(pieces)))
            if asked_first:
                self.attached.clear()
        return True

    def _earlier(self) -> list[AskedTurn]:
        """The turns that go along with the next question."""
        return self.history[-self.history_max :] if self.history_max else []

    def _ask_until_answered(self, query: Question, earlier: Sequence[AskedTurn]) -> Iterator[Part]:
        """Asks, and asks again where the server is only busy."""
        for attempt in count(1):
            try:
                return (yield from self.ask(query, earlier, self.system, self.settings))
            except ChatError as error:
                delay = retry_delay(error, attempt)
                if delay is None:
                    raise
                print(self._shown(f"{error.message}; retrying in {delay:.0f} s"), file=sys.stderr, flush=True)
                time.sleep(delay)

    def command(self, line: str) -> None:
        """Runs a slash command; a wrong one says what is right."""
        name, _, argument = line[1:].partition(" ")
        argument = argument.strip()
        commands = {
            "help": lambda: print(HELP),
            "clear": self._clear,
            "system": lambda: self._set_system(argument),
            "history": self._show_history,
            "set": lambda: self._set(*argument.split(maxsplit=1)),
            "model": lambda: self._set_model(argument),
            "image": lambda: self._attach(argument),
            "regen": self._regenerate,
            "save": lambda: self._save(argument),
            "load": lambda: self._load(argument),
        }
        if name not in commands:
            print(f"There is no command /{name}; /help lists them.")
            return
        try:
            commands[name]()
        except ChatError as error:
            print(error.message)
        except OSError as error:
            print(f"/{name} {argument}: {error.strerror}")

    def dim(self, text: str, end: str = "\n") -> bool:
        """Prints what is no part of the conversation, unless questions or answers go by a pipe; says whether it did."""
        shown = self.to_terminal and sys.stdin.isatty()
        if shown:
            print(f"\x1b[2m{self._shown(text)}\x1b[0m", end=end, flush=True)
        return shown

    def _shown(self, text: str) -> str:
        return without_controls(text) if self.to_terminal else text

    def _clear(self) -> None:
        self.history.clear()
        self.attached.clear()

    def _set_system(self, text: str) -> None:
        self.system = text or self.system
        print(self._shown(self.system))

    def _show_history(self) -> None:
        for query, answer in self.history:
            images = f"[images: {len(query.images)}] " if query.images else ""
            print(self._shown(f"> {images}{query}\n{answer}"))

    def _set(self, name: str = "", value: str = "") -> None:
        settings = self.settings.sampling()
        if name and name not in Sampling.model_fields:
            raise ChatError(f"There is no parameter {name}, only {', '.join(Sampling.model_fields)}.")
        if name:
            settings.pop(name, None)
            settings |= {name: _parsed(name, value)} if value else {}
            self.settings = validated(Sampling, settings)
        for name, value in self.settings.sampling().items():
            print(f"{name} = {value}")

    def _set_model(self, name: str) -> None:
        models = self.info().models
        if name and name not in models:
            raise ChatError(f"There is no model {name}, only {', '.join(models)}.")
        if name:
            # The first is the model itself, which answers where none is named.
            self.settings = self.settings.model_copy(update={"model": name if name != models[0] else None})
        for model in models:
            print(self._shown(f"{'*' if model == (self.settings.model or models[0]) else ' '} {model}"))

    def _attach(self, path: str) -> None:
        if path:
            info = self.info()
            if not info.images:
                raise ChatError(f"{', '.join(info.models[:1])} takes no images.")
            image = image_url(Path(path).expanduser())
            sent_again = [own for query, _ in self._earlier() for own in query.images]
            size = sum(map(len, [image, *self.attached.values(), *sent_again]))
            if size > info.max_body_size:
                raise ChatError(
                    f"{path}: the images of this conversation would take {size} bytes in a request, and this server's "
                    f"are at most {info.max_body_size}: make them smaller, or raise its --max-body-size."
                )
            self.attached[path] = image
        print(self._shown("\n".join(self.attached)) or "No image is attached.")

    def _regenerate(self) -> None:
        if not self.history:
            raise ChatError("There is nothing to answer again.")
        turn = self.history.pop()
        kept = len(self.history)
        self.answer(turn[0])
        if len(self.history) == kept:
            self.history.append(turn)

    def _save(self, path: str) -> None:
        conversation = {"system": self.system, "history": self.history}
        if any(query.images for query, _ in self.history):
            conversation["images"] = [query.images for query, _ in self.history]
        text = json.dumps(conversation, ensure_ascii=False, indent=1) + "\n"
        _file(path).write_text(text, encoding="utf-8")

    def _load(self, path: str) -> None:
        try:
            text = _file(path).read_text(encoding="utf-8")
            saved = json.loads(text)
            images = TypeAdapter(list[list[ImageURL]]).validate_python(saved.pop("images", []))
            saved = validated(ChatRequest, json.dumps({"query": "-", **saved}).encode())
            turns = zip(saved.history, images or [[]] * len(saved.history), strict=True)
            history = [(Question(query, own), answer) for (query, answer), own in turns]
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise ChatError(f"{path} holds no saved conversation.") from None
        if images and not self.info().images:
            print(self._shown(f"Its images are left out: {self.info().models[0]} takes none."))
            history = [(Question(query), answer) for query, answer in history]
        self.system, self.history = saved.system, history
        print(f"{len(self.history)} turns")


def _file(path: str) -> Path:
    if not path:
        raise ChatError("Name a file: /save FILE, /load FILE.")
    return Path(path).expanduser()


def image_url(file: Path) -> str:
    """An image file as a data URL.

    Raises:
        ChatError: it is no PNG, JPEG, WebP or GIF.
        OSError: it cannot be read.
    """
    data = file.read_bytes()
    kind = IMAGE.match(data)
    if not kind:
        raise ChatError(f"{file} is no PNG, JPEG, WebP or GIF image.")
    return f"data:image/{kind.lastgroup};base64,{base64.b64encode(data).decode()}"


def _session() -> PromptSession:
    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _break_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    LINE_HISTORY.parent.mkdir(parents=True, exist_ok=True)
    return PromptSession(history=FileHistory(LINE_HISTORY), multiline=True, key_bindings=keys, prompt_continuation="  ")


def without_controls(text: str) -> str:
    """Text as it may go to a terminal: an answer must not steer it with control characters."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def figures_line(result: ChatResult, began: float, first: float) -> str:
    """The line under a finished answer; `began`, `first`: when it was asked, and when its first token came."""
    seconds = max(time.monotonic() - first, 1e-9)
    figures = [f"first token {first - began:.2f} s"]
    if result.completion_tokens > 1:
        figures.append(f"{(result.completion_tokens - 1) / seconds:.1f} tokens/s")
    thoughts = f", {result.reasoning_tokens} of them thoughts" if result.reasoning_tokens else ""
    figures.append(f"{result.completion_tokens} tokens{thoughts}")
    if result.finish_reason == "length":
        figures.append("cut at the token limit")
    if result.dropped_turns:
        figures.append(f"{result.dropped_turns} old turns did not fit")
    return " · ".join(figures)


def given_sampling(args: argparse.Namespace) -> Sampling:
    """The sampling parameters on the command line; a ChatError names one that is wrong."""
    given = {name: getattr(args, name) for name in Sampling.model_fields if getattr(args, name, None) is not None}
    given = {name: _parsed(name, value) if isinstance(value, str) else value for name, value in given.items()}
    return validated(Sampling, given)


def _parsed(name: str, value: str) -> object:
    """A setting's value as typed: JSON where it is JSON (0.5, true, ["a"]), else the text itself."""
    if name == "model":
        return value
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = value
    return [str(parsed)] if name == "stop" and not isinstance(parsed, list) else parsed


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError("must be 0 or more")
    return int(text)
