"""Tool calls in an answer: which form a model's chat template has for them, and how they are read while they come.

vLLM's own parsers of these forms read a whole answer otherwise than a streamed one, lose calls that the token limit
cuts, or read all that has come anew for each token.
"""

import json
from collections.abc import Generator, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import regex

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

JSON_CALLS, XML_CALLS = "qwen_json", "qwen_xml"
"""The names of our parsers: for calls as a JSON object (Qwen2.5, Qwen3, QwQ), and as XML (Qwen3-Coder, 3.5 to 3.8)."""
START, END = "<tool_call>", "</tool_call>"
FORMS = {
    JSON_CALLS: rf'{START}\s*\{{"name": "probe", "arguments": \{{"x": "y"\}}\}}\s*{END}',
    XML_CALLS: rf"{START}\s*<function=probe>\s*<parameter=x>\s*y\s*</parameter>\s*</function>\s*{END}",
}
"""What a template writes for the call `probe(x="y")`."""
# These are matched against text of which more may come. So each is bounded: a model can write line breaks without end.
_HEAD = regex.compile(
    r'\s{0,16}\{\s{0,16}"name"\s{0,16}:\s{0,16}"([^"\\\n]{1,256})"\s{0,16},\s{0,16}"arguments"\s{0,16}:\s{0,16}\{'
)
_OPEN = regex.compile(r"\s{0,16}\{")
_JSON_END = regex.compile(rf"[^<]{{0,256}}?{END}")
_FUNCTION = regex.compile(r"\s{0,16}<function=([^<>\n]{1,256})>")
_FUNCTION_END = regex.compile(r"\s{0,16}</function>")
_XML_END = regex.compile(rf"\s{{0,16}}{END}")
_PARAMETER = regex.compile(r"\s{0,16}<parameter=([^<>\n]{1,256})>(?:\n|(?=[^\n]))")
# A text may hold </parameter> itself, and models leave it out now and then.
_VALUE_END = regex.compile(
    rf"\n?</parameter>\s{{0,16}}(?=<parameter=|</function>|{END})|\n?(?=</function>\s{{0,16}}{END})"
)
_LAST_VALUE_END = regex.compile(rf"{_VALUE_END.pattern}|\n?</parameter>\s{{0,16}}\Z|\n?(?=</function>\s{{0,16}}\Z)")


class Piece(NamedTuple):
    """A piece of an answer. A "name" begins a call; "arguments" are a piece of its arguments, as JSON."""

    kind: Literal["text", "name", "arguments"]
    text: str


Steps = Generator[Piece | None]
"""Yields pieces, and None where more of the answer must come first."""


def tool_parser_for(tokenizer: "PreTrainedTokenizerBase", chat_template: str | None, options: Mapping[str, Any]) -> str:
    """Choose the parser of tool calls by what a chat template writes; empty: it knows no tools, or another form.

    Args:
        chat_template: Jinja text that replaces the tokenizer's own.
        options: what the template is given beside the messages.
    """
    tool = {"name": "probe", "description": "?", "parameters": {"type": "object", "properties": {"x": {}}}}
    call = {"name": "probe", "arguments": {"x": "y"}}
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": "probe", "function": call}]},
        {"role": "tool", "tool_call_id": "probe", "content": "!"},
    ]
    with suppress(Exception):  # it knows no tools, or is broken, which is told by who needs it
        text = tokenizer.apply_chat_template(
            messages,
            tools=[{"type": "function", "function": tool}],
            chat_template=chat_template,
            tokenize=False,
            **options,
        )
        return next((name for name, form in FORMS.items() if regex.search(form, text)), "")
    return ""


def register() -> None:
    """Make our parsers of tool calls known to vLLM in this process."""
    from vllm.tool_parsers import ToolParserManager

    for name, parser in ((JSON_CALLS, "QwenJsonToolParser"), (XML_CALLS, "QwenXmlToolParser")):
        ToolParserManager.register_lazy_module(name, "qwen_vllm.vllm_plugin.tool_parsers", parser)


class CallReader:
    """Reads one answer, while it comes, into its text and its tool calls.

    What is no call is text. White space before a call, and behind the last one, is left out. Of a call that is cut
    all that came is kept.

    Args:
        parser: JSON_CALLS or XML_CALLS.
        properties: the JSON schemas of the parameters of each tool, by name. XML is typed by them.
    """

    def __init__(self, parser: str, properties: Mapping[str, Mapping[str, Any]]) -> None:
        self._read_call = self._json_call if parser == JSON_CALLS else self._xml_call
        # Qwen3-Coder leaves out the mark before a call now and then.
        bare = "|".join(map(regex.escape, properties)) if parser == XML_CALLS else ""
        self._start = regex.compile(f"{START}|(?=<function=(?:{bare})>)" if bare else START)
        self._properties = properties
        self._rest, self._last = "", False
        self._spaces, self._called = "", False
        self._steps = self._read()

    def read(self, text: str, last: bool) -> list[Piece]:
        """Take the next text of the answer, and return what has become clear; with the `last` one, all that is left."""
        self._rest += text
        self._last = last
        pieces = []
        for piece in self._steps:
            if piece is None:
                break
            pieces.append(piece)
        return pieces

    def _match(self, pattern: "regex.Pattern[str]") -> Generator[None, None, "regex.Match[str] | None"]:
        """Match at the start of what is left, as soon as that is clear, and take the match away."""
        while (found := pattern.match(self._rest, partial=not self._last)) and found.partial:
            yield None
        if found:
            self._rest = self._rest[found.end() :]
        return found

    def _read(self) -> Steps:
        while True:
            start = self._start.search(self._rest, partial=not self._last)
            position = start.start() if start else len(self._rest)
            yield from self._text(self._rest[:position])
            self._rest = self._rest[start.end() if start and not start.partial else position :]
            if start and not start.partial:
                yield from self._read_call(start[0])
            elif not self._last:
                yield None
            else:
                if self._spaces and not self._called:
                    yield Piece("text", self._spaces)
                return

    def _text(self, text: str) -> Steps:
        """Yield text, but hold back the white space at its end: a call may follow."""
        text = self._spaces + text
        shown = text.rstrip()
        self._spaces = text[len(shown) :]
        if shown:
            yield Piece("text", shown)

    def _begin(self, name: str) -> Piece:
        self._spaces, self._called = "", True
        return Piece("name", name)

    def _json_call(self, mark: str) -> Steps:
        """Read `{"name": …, "arguments": {…}}`: in this order piece by piece, in any other as a whole."""
        if not (head := (yield from self._match(_HEAD))):
            return (yield from self._whole_json_call(mark))
        yield self._begin(head[1])
        self._rest = "{" + self._rest
        for step in self._object():
            if step is None:
                yield None
            elif step[1]:
                yield Piece("arguments", step[1])
        yield from self._match(_JSON_END)

    def _object(self) -> Iterator[tuple[str, str] | None]:
        """Yield (what came, the same as JSON) of a JSON object until it ends, and None where more must come first."""
        object_ = JsonObject()
        while True:
            came = self._rest
            written, self._rest = object_.take(came)
            yield came[: len(came) - len(self._rest)], written
            if object_.ended or self._last:
                return
            yield None

    def _whole_json_call(self, mark: str) -> Steps:
        came = written = ""
        if opening := (yield from self._match(_OPEN)):
            came, self._rest = opening[0][:-1], "{" + self._rest
            for step in self._object():
                if step is None:
                    yield None
                else:
                    came, written = came + step[0], written + step[1]
        try:
            said = json.loads(written)
            name, arguments = said["name"], said.get("arguments") or {}
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            if not (isinstance(name, str) and name and isinstance(arguments, dict)):
                raise ValueError("no call")
        except (ValueError, KeyError, RecursionError):
            self._rest = came + self._rest
            return (yield from self._text(mark))
        yield self._begin(name)
        yield Piece("arguments", json.dumps(arguments, ensure_ascii=False))
        yield from self._match(_JSON_END)

    def _xml_call(self, mark: str) -> Steps:
        """Read `<function=…>`, its parameters and `</function>`."""
        if not (head := (yield from self._match(_FUNCTION))):
            return (yield from self._text(mark))
        yield self._begin(head[1])
        properties = self._properties.get(head[1], {})
        opening = "{"
        while parameter := (yield from self._match(_PARAMETER)):
            yield Piece("arguments", f"{opening}{json.dumps(parameter[1], ensure_ascii=False)}: ")
            if not (yield from self._xml_value(properties.get(parameter[1]))):
                return
            opening = ", "
        if not (yield from self._match(_FUNCTION_END)) and self._last:
            self._rest = ""
            return
        yield Piece("arguments", "}" if opening == ", " else "{}")
        yield from self._match(_XML_END)

    def _xml_value(self, schema: Any) -> Generator[Piece | None, None, bool]:
        """Read a parameter's value: a text as it comes, what is none as a whole. Return whether it came to its end."""
        from vllm.tool_parsers.utils import coerce_to_schema_type, extract_types_from_schema

        types, value = extract_types_from_schema(schema), ""
        is_text = types == ["string"]
        if is_text:
            yield Piece("arguments", '"')
        while True:
            end = (_LAST_VALUE_END if self._last else _VALUE_END).search(self._rest, partial=True)
            position = end.start() if end else len(self._rest)
            text, self._rest = self._rest[:position], self._rest[end.end() if end and not end.partial else position :]
            if is_text and text:
                yield Piece("arguments", json.dumps(text, ensure_ascii=False)[1:-1])
            value += text
            if end and not end.partial:
                whole: Any = value
                with suppress(RecursionError):
                    whole = coerce_to_schema_type(value, types)
                yield Piece("arguments", '"' if is_text else json.dumps(whole, ensure_ascii=False))
                return True
            if self._last:
                self._rest = ""
                return False
            yield None


class JsonObject:
    """Finds where a JSON object ends that comes in pieces, and escapes the line breaks that models write in strings."""

    def __init__(self) -> None:
        self.ended = False
        self._depth = 0
        self._in_string = self._escaped = False

    def take(self, text: str) -> tuple[str, str]:
        """Return (what belongs to the object, what comes after it) of the next piece."""
        parts, start = [], 0
        for i, character in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
                elif character < " ":
                    parts += [text[start:i], json.dumps(character)[1:-1]]
                    start = i + 1
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]<":
                self._depth -= 1
                # Outside a string `<` is the mark of the call's end: the object was not closed.
                if self._depth == 0 or character == "<":
                    self.ended = True
                    cut = i + (character != "<")
                    return "".join(parts) + text[start:cut], text[cut:]
        return "".join(parts) + text[start:], ""
