"""vLLM's tool parsers for Qwen's two forms of calls, on `CallReader`; and the grammars that hold a model to calls.

vLLM would make a structural tag for a call that must come. The grammar engine that bounds its work, guidance, cannot
take it. So the grammar is written here, in guidance's own language (Lark).
"""

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache, wraps
from types import SimpleNamespace
from typing import Any

from llguidance import LLMatcher, grammar_from
from pydantic_core import from_json
from vllm.entrypoints.generate.base.protocol import (
    DeltaFunctionCall,
    DeltaMessage,
    DeltaToolCall,
    ExtractedToolCallInformation,
    FunctionCall,
    ToolCall,
)
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.exceptions import VLLMValidationError
from vllm.renderers.chat_utils import make_tool_call_id
from vllm.sampling_params import StructuredOutputsParams
from vllm.tool_parsers import ToolParser
from vllm.tool_parsers.utils import extract_types_from_schema

from qwen_vllm.tool_calls import END, JSON_CALLS, START, XML_CALLS, CallReader, Piece

VALUE = 'value[suffix="\\n</parameter>\\n"]: /(?s:.*)/'


class QwenToolParser(ToolParser):
    """Reads an answer piece by piece, so that a whole one and a streamed one are the same.

    Attributes:
        reader: takes the pieces.
    """

    form: str
    supports_required_and_named = False  # by vLLM's own format, which is not the model's
    engine_based_streaming = True  # it takes each text once

    def __init__(self, tokenizer: Any, tools: Any = None) -> None:
        super().__init__(tokenizer, tools)
        self._functions = {(function := _function(tool)).name: function for tool in self.tools}
        parameters = {name: function.parameters or {} for name, function in self._functions.items()}
        properties = {name: schema.get("properties") or {} for name, schema in parameters.items()}
        self.reader = CallReader(self.form, properties)
        self._index = -1

    def extract_tool_calls(self, model_output: str, request: Any) -> ExtractedToolCallInformation:
        """Read a whole answer."""
        if not self._looks_for_calls(request):
            return ExtractedToolCallInformation(tools_called=False, tool_calls=[], content=model_output)
        text, calls = "", list[ToolCall]()
        for kind, piece in self.reader.read(model_output, last=True):
            if kind == "text":
                text += piece
            elif kind == "name":
                calls.append(ToolCall(function=FunctionCall(name=piece, arguments="")))
            else:
                calls[-1].function.arguments += piece
        return ExtractedToolCallInformation(tools_called=bool(calls), tool_calls=calls, content=text or None)

    def extract_tool_calls_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
        request: Any,
    ) -> DeltaMessage | None:
        """Read the next piece."""
        if not self._looks_for_calls(request):
            return DeltaMessage(content=delta_text) if delta_text else None
        return self._delta(self.reader.read(delta_text, last=False))

    def finish_streaming(self) -> DeltaMessage | None:
        """Return what was held back."""
        return self._delta(self.reader.read("", last=True))

    def adjust_request(self, request: Any) -> Any:
        """Hold the model to calls where the request does.

        Raises:
            VLLMValidationError: no such tool, or a strict one with a schema that no grammar can be made of.
        """
        if not self._looks_for_calls(request):
            return request
        if START in self.model_tokenizer.all_special_tokens:
            request.skip_special_tokens = False
        choice = request.tool_choice
        named = getattr(getattr(choice, "function", choice), "name", None)
        if named and named not in self._functions:
            raise VLLMValidationError(f"tool_choice: there is no tool {named!r} in tools", parameter="tool_choice")
        functions = [function for name, function in self._functions.items() if named in (None, name)]
        must = bool(named) or choice == "required"
        single = request.parallel_tool_calls is False
        given = request.extract_structured_outputs()
        if must or (given is None and single) or any(function.strict for function in functions):
            grammar = self._grammar(functions, must, single, None if must else given)
            if grammar:
                # Said here, it comes before a streamed answer begins.
                if wrong := LLMatcher.validate_grammar(grammar_from("grammar", grammar)):
                    raise VLLMValidationError(f"tools: {wrong.splitlines()[0]}", parameter="tools")
                request.structured_outputs = StructuredOutputsParams(grammar=grammar)
                setattr(request, "text" if isinstance(request, ResponsesRequest) else "response_format", None)
        return request

    def _looks_for_calls(self, request: Any) -> bool:
        return bool(self._functions) and request.tool_choice != "none"

    def _delta(self, pieces: Iterable[Piece]) -> DeltaMessage | None:
        text, calls = "", list[DeltaToolCall]()
        for kind, piece in pieces:
            if kind == "text":
                text += piece
            elif kind == "name":
                self._index += 1
                function = DeltaFunctionCall(name=piece, arguments="")
                calls.append(
                    DeltaToolCall(id=make_tool_call_id(), type="function", index=self._index, function=function)
                )
            elif calls and calls[-1].index == self._index:
                calls[-1].function.arguments += piece
            else:
                calls.append(DeltaToolCall(index=self._index, function=DeltaFunctionCall(arguments=piece)))
        if calls:
            return DeltaMessage(content=text or None, tool_calls=calls)
        return DeltaMessage(content=text) if text else None

    def _grammar(self, functions: list[Any], must: bool, single: bool, given: StructuredOutputsParams | None) -> str:
        """Write the grammar of an answer with calls; empty where there is none that says what the request says.

        Args:
            functions: the tools that may be called.
            must: there has to be a call.
            single: there may be one call at most.
            given: what the answer has to be, if it is no call.
        """
        known = self.vocab.keys() >= {START, END}
        start, end = (START, END) if known else (json.dumps(START), json.dumps(END))
        rules = ["call: " + " | ".join(f"call{i}" for i in range(len(functions)))]
        for i, function in enumerate(functions):
            parts = self._call(i, function, rules)
            rules.append(f"call{i}: {start} {' '.join(parts)} {end}")
        calls = "S call" if single else "(S call)+"
        schema = given and (given.json or ({"type": "object"} if given.json_object else None))
        if must:
            rules.append(f"start: {calls}")
        elif schema:
            rules += [
                f"start: {calls} | S given",
                f"given: %json {schema if isinstance(schema, str) else json.dumps(schema)}",
            ]
        elif given or not known:
            return ""  # of free text only a token can keep the mark of a call apart
        else:
            rules += ["start: TEXT? (call S)?" if single else "start: TEXT? (call TEXT?)*", r"TEXT: /(?s:.+)/"]
        return "\n".join([*rules, r"S: /\s*/", VALUE])

    def _call(self, number: int, function: Any, rules: list[str]) -> list[str]:
        """Return the parts of a call of a tool, between the marks; the rules that they need are added to `rules`."""
        raise NotImplementedError


class QwenJsonToolParser(QwenToolParser):
    """For calls as a JSON object."""

    form = JSON_CALLS

    def _call(self, number: int, function: Any, rules: list[str]) -> list[str]:
        schema = function.parameters if function.strict else None
        rules.append(f"arguments{number}: %json {json.dumps(schema or {'type': 'object'})}")
        name = json.dumps(function.name, ensure_ascii=False)
        return [json.dumps(f'\n{{"name": {name}, "arguments": '), f"arguments{number}", json.dumps("}\n")]


class QwenXmlToolParser(QwenToolParser):
    """For calls as XML."""

    form = XML_CALLS

    def _call(self, number: int, function: Any, rules: list[str]) -> list[str]:
        head, foot = json.dumps(f"\n<function={function.name}>\n"), json.dumps("</function>\n")
        if not function.strict:
            rules.append(f'parameter{number}: "<parameter=" /[^<>\\n]+/ ">\\n" value')
            return [head, f"parameter{number}*", foot]
        schema = function.parameters or {}
        required, steps = schema.get("required") or [], []
        for i, (name, what) in enumerate((schema.get("properties") or {}).items()):
            rule = f"parameter{number}_{i}"
            steps.append(rule if name in required else f"{rule}?")
            value = "value"
            if isinstance(what, dict) and "string" not in extract_types_from_schema(what):
                definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
                value = f'%json {json.dumps({**what, **definitions})} "\\n</parameter>\\n"'
            elif isinstance(what, dict) and what.get("enum"):
                words = [word if isinstance(word, str) else json.dumps(word) for word in what["enum"]]
                value = f'({" | ".join(map(json.dumps, words))}) "\\n</parameter>\\n"'
            rules.append(f"{rule}: {json.dumps(f'<parameter={name}>' + chr(10))} {value}")
        return [head, *steps, foot]


def _function(tool: Any) -> Any:
    """Return what has the name, the parameters and `strict`: of Chat Completions a part of the tool."""
    return getattr(tool, "function", tool)


def only_where_tools_are(make: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap vLLM's method that makes the parser of an answer: ours are left out of a request that has no tools."""

    @wraps(make)
    def made(self: Any, request: Any, *args: Any) -> Any:
        parser = self.parser_cls
        if request.tools or not issubclass(parser.tool_parser_cls or object, QwenToolParser):
            return make(self, request, *args)
        if not parser.reasoning_parser_cls:
            return None
        return make(SimpleNamespace(parser_cls=_without_tools(parser), model_config=self.model_config), request, *args)

    return made


@cache
def _without_tools(parser: type[Any]) -> type[Any]:
    return type(parser.__name__, (parser,), {"tool_parser_cls": None})


def takes_cut_arguments(convert: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap vLLM's method that gives an answer Anthropic's form, which takes arguments only as whole JSON."""

    @wraps(convert)
    def converted(self: Any, answer: Any) -> Any:
        for call in answer.choices[0].message.tool_calls:
            arguments: Any = {}
            with suppress(ValueError):
                arguments = from_json(call.function.arguments or "{}", allow_partial="trailing-strings")
            call.function.arguments = json.dumps(arguments if isinstance(arguments, dict) else {})
        return convert(self, answer)

    return converted
