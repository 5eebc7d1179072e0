"""Runs a chat in the terminal: line editing, commands, printing, Ctrl-C.

The client and the offline program share it. It is given a function that streams answers and does not know what
generates them.
"""

import argparse
import base64
import io
import json
import os
import re
import sys
import time
import unicodedata
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Annotated, Any

from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from pydantic import StringConstraints, TypeAdapter

from qwen_vllm.cache import STATE
from qwen_vllm.flags import given_sampling, typed
from qwen_vllm.protocol import (
    AskedTurn,
    ChatError,
    ChatRequest,
    ChatResult,
    Part,
    Question,
    Reasoning,
    Sampling,
    ServerInfo,
    one_line,
    text_turns,
    turns_to_drop,
    validated,
)
from qwen_vllm.retry import retry_delay
from qwen_vllm.words import say

Ask = Callable[[Question, Sequence[AskedTurn], str | None, Sampling], Iterator[Part]]
"""(query, history, system, sampling) → `Reasoning` and str pieces, then one `ChatResult`; raises ChatError."""

LINE_HISTORY = STATE / "lines"
ALONE = ("help", "clear", "history", "regen", "exit")
"""The commands that take nothing behind them."""
NO_TEXT = re.compile("[\ud800-\udfff]")
"""What Python reads of bytes that are not UTF-8."""
IMAGE = re.compile(
    rb"(?P<png>\x89PNG\r\n\x1a\n)|(?P<jpeg>\xff\xd8\xff)|(?P<webp>RIFF.{4}WEBP)|(?P<gif>GIF8[79]a)", re.DOTALL
)
ImageURL = Annotated[str, StringConstraints(pattern="^data:image/")]
COMMANDS = {
    "/help": "this list",
    "/clear": "start a new conversation",
    "/system [TEXT]": "show or set the system prompt",
    "/history": "show the conversation",
    "/set [NAME VALUE]": "show or set a sampling parameter; without VALUE: back to the default",
    "/model [NAME]": "show which models there are, or choose one (a LoRA adapter)",
    "/effort [LEVEL]": "show or set how much the model reasons, if it has levels (Qwen3.8)",
    "/image [FILE]": "attach an image to the next question, or list what is attached",
    "/regen": "answer the last question again",
    "/save FILE": "write the conversation to a file",
    "/load FILE": "go on with a saved conversation",
    "/exit": "leave (or Ctrl-D)",
}


def run(ask: Ask, title: str, args: argparse.Namespace, info: Callable[[], ServerInfo]) -> int:
    """Chat until the user leaves; on a pipe, answer a question a line.

    `info` describes the server: its models, and whether it takes images.

    Returns the exit status: 1 where a question from a pipe got no answer, 2 where a flag is wrong.
    """
    try:
        sampling = given_sampling(args)
    except ChatError as error:
        print(error.message, file=sys.stderr)
        return 2
    chat = Chat(ask, args.system, sampling, args.history_max, info)
    if not sys.stdin.isatty():
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # what is not UTF-8 is told, line by line
        answered = [chat.answer(line.strip()) for line in sys.stdin if line.strip()]
        return 0 if all(answered) else 1
    chat.remark(f"{title}\n{say('/help lists the commands, Ctrl-D leaves.')}")
    session = _session()
    while True:
        try:
            line = session.prompt("> ").strip()
            if line == "/exit":
                return 0
            if is_command(line):
                chat.command(line)
            elif line:
                chat.answer(line)
        except KeyboardInterrupt:
            continue
        except EOFError:
            return 0


class Chat:
    """Holds a conversation and its settings. A failed question changes nothing."""

    def __init__(
        self, ask: Ask, system: str | None, sampling: Sampling, history_max: int, info: Callable[[], ServerInfo]
    ) -> None:
        self.ask, self.info, self.history_max = ask, info, history_max
        self.system, self.settings = system, sampling
        self.history: list[AskedTurn] = []
        self.attached: dict[str, str] = {}
        """The images of the next question: data URLs by file path."""
        self.to_terminal = sys.stdout.isatty()
        self.shows_remarks = self.to_terminal and sys.stdin.isatty()

    def answer(self, text: str) -> bool:
        """Ask with the attached images and print the answer; return False where there is none."""
        if NO_TEXT.search(text):
            self._tell_error(say("the question is not UTF-8: convert it first"))
            return False
        turns = len(self.history)
        answered = self._answer(Question(text, tuple(self.attached.values())), self.history)
        if len(self.history) > turns:
            self.attached.clear()
        return answered

    def _answer(self, question: Question, earlier: list[AskedTurn]) -> bool:
        """Print the answer and add the turn to `earlier`; Ctrl-C keeps what has arrived."""
        began, first = time.monotonic(), None
        text, reasoning, figures, in_reasoning, unanswered = "", "", "", False, False
        parts = self._ask_until_answered(question, self._sent_along(earlier))
        try:
            for part in parts:
                first = time.monotonic() if first is None else first
                if isinstance(part, ChatResult):
                    figures = figures_line(part, began, first)
                    reasoning, unanswered = part.kept_reasoning, part.ended_in_reasoning
                elif isinstance(part, Reasoning):
                    reasoning += part.text
                    self.remark(part.text, end="")
                    in_reasoning = self.shows_remarks
                else:
                    text += part  # before it is printed, or Ctrl-C could drop a piece that is shown
                    if in_reasoning:
                        print("\n")
                        in_reasoning = False
                    print(self._shown(part), end="", flush=True)
        except KeyboardInterrupt:
            pass
        except ChatError as error:
            if in_reasoning or text:
                print(flush=True)
            self._tell_error(error.message)
            return False
        finally:
            parts.close()
        print(flush=True)
        self.remark(figures or say("stopped"))
        if figures or text:
            self.history = [*earlier, (question, text, reasoning)]
        if unanswered:
            print(only_reasoning(self.info), file=sys.stderr, flush=True)
        return not unanswered

    def _tell_error(self, message: str) -> None:
        print(self._shown(say("Error: {message}", message=message)), file=sys.stderr, flush=True)

    def _sent_along(self, turns: list[AskedTurn]) -> list[AskedTurn]:
        """Return the last turns: at most `history_max`, or up to a quarter fewer, so that they begin alike for long."""
        least = max(0, len(turns) - self.history_max)
        return turns[turns_to_drop(least, least + self.history_max // 4) :]

    def _ask_until_answered(self, query: Question, earlier: Sequence[AskedTurn]) -> Generator[Part, None, None]:
        """Ask; ask again while the server is busy."""
        for attempt in count(1):
            try:
                yield from self.ask(query, earlier, self.system, self.settings)
                return
            except ChatError as error:
                delay = retry_delay(error, attempt)
                told = say("{message}; retrying in {seconds:.0f} s", message=error.message, seconds=delay)
                print(self._shown(told), file=sys.stderr, flush=True)
                time.sleep(delay)

    def command(self, line: str) -> None:
        """Run a slash command; print what is wrong with a wrong one."""
        name, argument = _words(line)
        commands: dict[str, Callable[[], object]] = {
            "help": lambda: print(help_text()),
            "clear": self._clear,
            "system": lambda: self._set_system(argument),
            "history": self._show_history,
            "set": lambda: self._set(*argument.split(maxsplit=1)),
            "model": lambda: self._set_model(argument),
            "effort": lambda: self._set_effort(argument),
            "image": lambda: self._attach(argument),
            "regen": self._regenerate,
            "save": lambda: self._save(argument),
            "load": lambda: self._load(argument),
        }
        if name not in commands:
            print(say("There is no command /{name}; /help lists them.", name=name))
            return
        try:
            commands[name]()
        except ChatError as error:
            print(error.message)
        except OSError as error:
            print(f"/{name} {argument}: {error.strerror}")

    def remark(self, text: str, end: str = "\n") -> None:
        """Print a dimmed text if stdin and stdout are terminals."""
        if self.shows_remarks:
            print(f"\x1b[2m{self._shown(text)}\x1b[0m", end=end, flush=True)

    def _shown(self, text: str) -> str:
        return without_controls(text) if self.to_terminal else text

    def _clear(self) -> None:
        self.history.clear()
        self.attached.clear()

    def _set_system(self, text: str) -> None:
        self.system = text or self.system
        print(say("No system prompt.") if self.system is None else self._shown(self.system))

    def _show_history(self) -> None:
        for query, answer, _ in self.history:
            images = say("[images: {number}] ", number=len(query.images)) if query.images else ""
            print(self._shown(f"> {images}{query.text}\n{answer}"))

    def _set(self, name: str = "", value: str = "") -> None:
        settings = self.settings.sampling()
        if name and name not in Sampling.model_fields:
            known = ", ".join(Sampling.model_fields)
            raise ChatError(say("There is no parameter {name}, only {known}.", name=name, known=known))
        if name:
            settings.pop(name, None)
            if value:
                settings[name] = typed(name, value)
            self.settings = validated(Sampling, settings)
        for name, value in self.settings.sampling().items():
            print(f"{name} = {value}")

    def _set_model(self, name: str) -> None:
        # The first name is the model's own; the server uses it where a request names none.
        self._choose("model", say("There is no model {choice}, only {known}."), self.info().models, name)

    def _set_effort(self, level: str) -> None:
        info = self.info()
        if not info.reasoning_efforts:
            raise ChatError(say("{model} has no levels of reasoning effort.", model=info.models[0]))
        wrong = say("There is no effort {choice}, only {known}.")
        self._choose("reasoning_effort", wrong, ["default", *info.reasoning_efforts], level)

    def _choose(self, parameter: str, wrong: str, choices: list[str], choice: str) -> None:
        """Set a parameter to one of `choices`, of which the first is its default; show them. `wrong`: for others."""
        if choice and choice not in choices:
            raise ChatError(wrong.format(choice=choice, known=", ".join(choices)))
        if choice:
            self.settings = self.settings.model_copy(update={parameter: choice if choice != choices[0] else None})
        chosen = getattr(self.settings, parameter) or choices[0]
        for known in choices:
            print(self._shown(f"{'*' if known == chosen else ' '} {known}"))

    def _attach(self, path: str) -> None:
        if path:
            info = self.info()
            if not info.images:
                raise ChatError(say("{model} takes no images.", model=info.models[0]))
            image = image_url(_file(path))
            sent_again = [url for query, *_ in self._sent_along(self.history) for url in query.images]
            size = sum(len(url) for url in (image, *self.attached.values(), *sent_again))
            if size > info.max_body_size:
                raise ChatError(
                    say(
                        "{path}: the images of this conversation would take {size} bytes in a request, and this "
                        "server's are at most {most}: make them smaller, or let it take larger requests.",
                        path=path,
                        size=size,
                        most=info.max_body_size,
                    )
                )
            self.attached[path] = image
        print(self._shown("\n".join(self.attached)) or say("No image is attached."))

    def _regenerate(self) -> None:
        if not self.history:
            raise ChatError(say("There is nothing to answer again."))
        *earlier, (question, *_) = self.history
        self._answer(question, earlier)

    def _save(self, path: str) -> None:
        _file(path).write_text(saved(self.system, self.history), encoding="utf-8")

    def _load(self, path: str) -> None:
        try:
            saved = json.loads(_file(path).read_text(encoding="utf-8"))
            images = TypeAdapter(list[tuple[ImageURL, ...]]).validate_python(saved.pop("images", []))
            chat = validated(ChatRequest, json.dumps({"query": "-", **saved}).encode())
            turns = zip(chat.history, images or [()] * len(chat.history), strict=True)
            history = [(Question(query, own), answer, "".join(kept)) for (query, answer, *kept), own in turns]
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise ChatError(say("{path} holds no saved conversation.", path=path)) from None
        if images and not self.info().images:
            left_out = say("Its images are left out: {model} takes none.", model=self.info().models[0])
            print(self._shown(left_out))
            history = [(Question(query.text), answer, kept) for query, answer, kept in history]
        self.system, self.history = chat.system, history
        print(say("{number} turns", number=len(self.history)))


def is_command(line: str) -> bool:
    """Tell whether a line is a slash command, or a mistyped one; another that begins with a slash is a question."""
    name, argument = _words(line)
    if not line.startswith("/") or NO_TEXT.search(line):
        return False
    if name in ALONE:
        return not argument
    if name in ("model", "effort"):
        return len(argument.split()) <= 1
    if name in ("image", "save", "load"):
        return len(argument.split()) <= 1 or bool(Path(argument).suffix) or os.path.exists(_file(argument))
    return name in ("system", "set") or not (argument or "/" in name)


def _words(line: str) -> tuple[str, str]:
    """Split a slash command into its name and what follows it."""
    name, argument = re.split(r"\s+|$", line[1:], maxsplit=1)
    return name, argument


def saved(system: str | None, history: Sequence[AskedTurn]) -> str:
    """Return a conversation as the JSON file that /load takes."""
    conversation: dict[str, Any] = {"system": system, "history": text_turns(history)}
    if any(query.images for query, *_ in history):
        conversation["images"] = [query.images for query, *_ in history]
    return one_line(json.dumps(conversation, ensure_ascii=False, indent=1).encode()).decode() + "\n"


def _file(path: str) -> Path:
    if not path:
        raise ChatError(say("Name a file: /save FILE, /load FILE."))
    return Path(os.path.expanduser(path))  # ~NAME stays where there is no such user; Path.expanduser would fail


def image_url(file: Path) -> str:
    """Read an image file as a data URL.

    Raises:
        ChatError: the file is no PNG, JPEG, WebP or GIF.
        OSError: it cannot be read.
    """
    data = file.read_bytes()
    kind = IMAGE.match(data)
    if not kind:
        raise ChatError(say("{file} is no PNG, JPEG, WebP or GIF image.", file=file))
    return f"data:image/{kind.lastgroup};base64,{base64.b64encode(data).decode()}"


class LineHistory(FileHistory):
    """Keeps typed lines in a file. What cannot be kept, for the disk or for bytes that are no text, is left out."""

    def store_string(self, string: str) -> None:
        with suppress(OSError, UnicodeEncodeError):
            super().store_string(string)


def _session() -> PromptSession[str]:
    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _break_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    with suppress(OSError):
        LINE_HISTORY.parent.mkdir(parents=True, exist_ok=True)
    return PromptSession(history=LineHistory(LINE_HISTORY), multiline=True, key_bindings=keys, prompt_continuation="  ")


def help_text() -> str:
    """Return what /help shows: the commands, then the keys."""
    lines = [f"{command:21}{say(text)}" for command, text in COMMANDS.items()]
    return "\n".join([*lines, say("Enter sends, Alt-Enter breaks the line, Ctrl-C stops the answer.")])


def without_controls(text: str) -> str:
    """Remove control characters, so that an answer cannot control the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def figures_line(result: ChatResult, began: float, first: float) -> str:
    """Return the line under an answer; `began`: its question, `first`: its first part."""
    seconds = max(time.monotonic() - first, 1e-9)
    figures = [say("first_token", seconds=first - began)]
    if result.completion_tokens > 1:
        figures.append(say("speed", speed=(result.completion_tokens - 1) / seconds))
    thoughts = say(", {number} of them thoughts", number=result.reasoning_tokens) if result.reasoning_tokens else ""
    figures.append(say("{number} tokens", number=result.completion_tokens) + thoughts)
    if result.finish_reason == "length":
        figures.append(say("cut"))
    if result.dropped_turns:
        figures.append(say("{number} old turns left out", number=result.dropped_turns))
    if result.dropped_reasoning:
        figures.append(say("reasoning of {number} old turns left out", number=result.dropped_reasoning))
    return " · ".join(figures)


def only_reasoning(info: Callable[[], ServerInfo]) -> str:
    """Say why there is no answer where the token limit came inside the reasoning, and what to set.

    `info` describes the server, with the levels of its model's reasoning effort.
    """
    try:
        levels = info().reasoning_efforts
    except ChatError:
        levels = []
    lower = say(", or choose a lower reasoning_effort ({levels}; in the chat /effort)", levels=", ".join(levels))
    return say(
        "No answer: at the token limit the model was still reasoning. "
        "Raise max_tokens, or set a thinking_budget below it{lower}.",
        lower=lower if levels else "",
    )
