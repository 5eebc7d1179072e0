"""Chat templates with tools, in the two forms that Qwen's have, and what models write in each."""

import json
from collections.abc import Callable
from typing import Any

_TOOLS = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '# Tools\\n\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
    {{- '\\n</tools>\\n\\nA call is written as <tool_call>…</tool_call>.<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = message.content | map(attribute='text') | join if message.content else '' %}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' + content }}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function %}
            CALL
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
JSON_TOOLS = _TOOLS.replace(
    "CALL",
    '{{- \'\\n<tool_call>\\n{"name": "\' + call.name + \'", "arguments": \' }}'
    "{{- call.arguments if call.arguments is string else call.arguments | tojson }}{{- '}\\n</tool_call>' }}",
)
"""As Qwen2.5 and Qwen3 write calls."""
XML_TOOLS = _TOOLS.replace(
    "CALL",
    "{{- '\\n<tool_call>\\n<function=' + call.name + '>\\n' }}"
    "{%- for name, value in call.arguments | items %}"
    "{{- '<parameter=' + name + '>\\n' + (value if value is string else value | tojson) + '\\n</parameter>\\n' }}"
    "{%- endfor %}{{- '</function>\\n</tool_call>' }}",
)
"""As Qwen3-Coder and Qwen3.5 to 3.8 write them."""

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of some days.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "options": {"type": "object"},
                "unit": {"enum": ["C", "F"]},
            },
            "required": ["city"],
        },
    },
}
NOW = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
TOOLS = [WEATHER, NOW]


def as_json(name: str, arguments: Any) -> str:
    """What a model writes for a call as JSON."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments, ensure_ascii=False)}}}\n</tool_call>'


def as_xml(name: str, arguments: dict[str, Any]) -> str:
    """What a model writes for a call as XML."""
    values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
    body = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"


SAID = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")
"""The control tokens with which a prompt of `scripted` may end; a reciter says what follows on the last."""


def scripted(template: str, thinks: bool = False) -> str:
    """A template whose prompt ends with one of SAID: without tools the first, with tools the second, behind a tool's
    result the third, or the one that the option `say` has the number of.
    """
    end = "{{- '<think>\\n' if enable_thinking is not defined or enable_thinking else '<think>\\n\\n</think>\\n\\n' }}"
    said = "{%- set usual = 2 if messages[-1].role == 'tool' else 1 if tools else 0 %}"
    say = f"{{{{- {list(SAID)}[say if say is defined else usual] }}}}"
    return template.removesuffix("{%- endif %}\n") + (end if thinks else "") + said + say + "{%- endif %}\n"


WEATHER_ARGUMENTS = {"city": '北京 "X"\n二', "days": 3, "options": {"a": {"b": ["c", 1.5, None]}}, "unit": "C"}
PLAIN, RESULT, BEFORE, THOUGHT = "Hello 朋友! 🎉", "It is sunny in 北京.", "I look at both.", "Hm, 让我想想."
OBJECT = '{"answer": 5, "why": "2 + 3"}'
NO_CALL = "Write <tool_call> before a call, and </tool_call> behind it."


def recited(write: Callable[[str, dict[str, Any]], str], thinks: bool = False) -> list[str]:
    """What a reciter with a template of `scripted` says, on each of SAID: PLAIN; a call of `get_weather`; RESULT; two
    calls behind BEFORE; OBJECT; NO_CALL. Where it must make a call and has none to make, it calls `now`.
    """
    answers = [
        PLAIN,
        write("get_weather", WEATHER_ARGUMENTS),
        RESULT,
        f"{BEFORE}\n\n{write('get_weather', {'unit': 'K', 'city': 'Paris'})}\n{write('now', {})}",
        OBJECT,
        NO_CALL,
    ]
    thought = f"{THOUGHT}\n</think>\n\n"
    starts = {"<think>\n": thought, "</think>\n\n": ""} if thinks else {"": ""}
    texts = [
        f"{lead}{said}{thought}{answer}<|im_end|>"
        for lead, thought in starts.items()
        for said, answer in zip(SAID, answers, strict=True)
    ]
    return [*texts, f"{write('now', {})}<|im_end|>"]
