"""One client of others, asked in one way: `python python_clients.py CLIENT CASE URL KEY`. Runs in .clients.

It prints what the client got, and for the case "tools" with which arguments it called the tool.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MODEL, QUESTION = "Scripted", "?"
CALLED: list[dict[str, Any]] = []


def get_weather(city: str, days: int = 1, options: dict[str, Any] | None = None, unit: str = "C") -> str:
    """The weather of some days.

    Args:
        city: where.
        days: how many.
        options: more.
        unit: C or F.
    """
    CALLED.append({"city": city, "days": days, "options": options, "unit": unit})
    return "晴"


PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "options": {"type": "object"},
        "unit": {"type": "string"},
    },
    "required": ["city"],
}
FUNCTION = {"name": "get_weather", "description": "The weather.", "parameters": PARAMETERS}
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "integer"}, "why": {"type": "string"}},
    "required": ["answer", "why"],
    "additionalProperties": False,
}


def openai(case: str, url: str, key: str) -> str:
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key=key)
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    create = client.chat.completions.create
    match case:
        case "completions":
            return (
                client.completions.create(model=MODEL, prompt="<|fim_prefix|>", temperature=0, max_tokens=50)
                .choices[0]
                .text
            )
        case "streamed":
            chunks = create(model=MODEL, messages=messages, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        case "schema":
            form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
            extra = {"chat_template_kwargs": {"say": 4}}
            return (
                create(model=MODEL, messages=messages, response_format=form, extra_body=extra)
                .choices[0]
                .message.content
            )
        case "tools" | "streamed tools":
            tools = [{"type": "function", "function": FUNCTION}]
            if case == "tools":
                message = create(model=MODEL, messages=messages, tools=tools).choices[0].message
            else:
                with client.chat.completions.stream(model=MODEL, messages=messages, tools=tools) as stream:
                    message = stream.get_final_completion().choices[0].message
            messages.append(message.model_dump(exclude_none=True))
            for call in message.tool_calls:
                content = get_weather(**json.loads(call.function.arguments))
                messages.append({"role": "tool", "tool_call_id": call.id, "content": content})
            return create(model=MODEL, messages=messages, tools=tools).choices[0].message.content
    return create(model=MODEL, messages=messages).choices[0].message.content


def openai_responses(case: str, url: str, key: str) -> str:
    from openai import OpenAI

    create = OpenAI(base_url=f"{url}/v1", api_key=key).responses.create
    if case == "streamed":
        events = create(model=MODEL, input=QUESTION, stream=True)
        return "".join(event.delta for event in events if event.type == "response.output_text.delta")
    if case == "tools":
        tools = [{"type": "function", **FUNCTION}]
        items: list[Any] = [{"role": "user", "content": QUESTION}]
        said = create(model=MODEL, input=items, tools=tools)
        items += said.output
        for call in said.output:
            if call.type == "function_call":
                content = get_weather(**json.loads(call.arguments))
                items.append({"type": "function_call_output", "call_id": call.call_id, "output": content})
        return create(model=MODEL, input=items, tools=tools).output_text
    return create(model=MODEL, input=QUESTION).output_text


def anthropic(case: str, url: str, key: str) -> str:
    from anthropic import Anthropic

    client = Anthropic(base_url=url, api_key=key)
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 300, "messages": [{"role": "user", "content": QUESTION}]}
    if case == "streamed":
        with client.messages.stream(**asked) as stream:
            return "".join(stream.text_stream)
    if case in ("tools", "streamed tools"):
        tool = {"name": "get_weather", "description": "The weather.", "input_schema": PARAMETERS}
        asked["tools"] = [tool]
        if case == "tools":
            said = client.messages.create(**asked)
        else:
            with client.messages.stream(**asked) as stream:
                said = stream.get_final_message()
        results = [
            {"type": "tool_result", "tool_use_id": block.id, "content": get_weather(**block.input)}
            for block in said.content
            if block.type == "tool_use"
        ]
        asked["messages"] += [{"role": "assistant", "content": said.content}, {"role": "user", "content": results}]
    return client.messages.create(**asked).content[-1].text


def litellm(case: str, url: str, key: str) -> str:
    import litellm

    asked: dict[str, Any] = {"model": f"hosted_vllm/{MODEL}", "api_base": f"{url}/v1", "api_key": key}
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    if case == "streamed":
        chunks = litellm.completion(**asked, messages=messages, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    if case == "tools":
        asked["tools"] = [{"type": "function", "function": FUNCTION}]
        message = litellm.completion(**asked, messages=messages).choices[0].message
        messages.append(message)
        for call in message.tool_calls:
            content = get_weather(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": content})
    return litellm.completion(**asked, messages=messages).choices[0].message.content


def langchain_openai(case: str, url: str, key: str) -> str:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    model: Any = ChatOpenAI(model=MODEL, base_url=f"{url}/v1", api_key=key)
    messages: list[Any] = [HumanMessage(QUESTION)]
    if case == "streamed":
        return "".join(chunk.content for chunk in model.stream(messages))
    if case == "tools":
        model = model.bind_tools([tool(get_weather)])
        message = model.invoke(messages)
        messages.append(message)
        for call in message.tool_calls:
            messages.append(ToolMessage(get_weather(**call["args"]), tool_call_id=call["id"]))
    return model.invoke(messages).content


def pydantic_ai(case: str, url: str, key: str) -> str:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=f"{url}/v1", api_key=key))
    if case == "streamed":

        async def streamed() -> str:
            async with Agent(model).run_stream(QUESTION) as answer:
                return "".join([text async for text in answer.stream_text(delta=True)])

        return asyncio.run(streamed())
    return Agent(model, tools=[get_weather] if case == "tools" else []).run_sync(QUESTION).output


def openai_agents(case: str, url: str, key: str) -> str:
    from agents import Agent, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled
    from openai import AsyncOpenAI

    set_tracing_disabled(True)
    model = OpenAIChatCompletionsModel(MODEL, AsyncOpenAI(base_url=f"{url}/v1", api_key=key))
    tools = [function_tool(get_weather, strict_mode=False)] if case == "tools" else []
    agent = Agent("agent", model=model, tools=tools)
    if case == "streamed":

        async def streamed() -> str:
            answer, text = Runner.run_streamed(agent, QUESTION), ""
            async for event in answer.stream_events():
                if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
                    text += event.data.delta
            return text

        return asyncio.run(streamed())
    return Runner.run_sync(agent, QUESTION).final_output


def llm(case: str, url: str, key: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        model = {"model_id": "scripted", "model_name": MODEL, "api_base": f"{url}/v1", "supports_tools": True}
        model["api_key_name"] = "qwen"  # without it, no key is sent, not even that of --key
        Path(folder, "extra-openai-models.yaml").write_text(json.dumps([model]))
        called = Path(folder, "called")
        function = f"""import json
def get_weather(city: str, days: int = 1, options: dict = None, unit: str = "C") -> str:
    "The weather."
    open({str(called)!r}, "w").write(json.dumps({{"city": city, "days": days, "options": options, "unit": unit}}))
    return "晴"
"""
        command = [str(Path(sys.executable).with_name("llm")), "-m", "scripted", "--key", key, QUESTION]
        command += {"streamed": [], "tools": ["--no-stream", "--functions", function]}.get(case, ["--no-stream"])
        environment = {**os.environ, "LLM_USER_PATH": folder}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if called.exists():
            CALLED.append(json.loads(called.read_text()))
        if done.returncode:
            raise RuntimeError(done.stderr.strip())
        return done.stdout


def qwen_agent(case: str, url: str, key: str) -> str:
    from qwen_agent.agents import Assistant
    from qwen_agent.tools.base import BaseTool

    class Weather(BaseTool):
        name, description, parameters = "get_weather", "The weather.", PARAMETERS

        def call(self, params: Any, **_: Any) -> str:
            return get_weather(**(json.loads(params) if isinstance(params, str) else params))

    model = {"model": MODEL, "model_server": f"{url}/v1", "api_key": key, "generate_cfg": {"use_raw_api": True}}
    agent = Assistant(llm=model, function_list=[Weather()] if case == "tools" else [])
    answers = [*agent.run([{"role": "user", "content": QUESTION}])]
    return answers[-1][-1]["content"]


QUESTIONS = [{"query": QUESTION, "response": "Hello 朋友! 🎉"}, {"query": "And now?", "response": "Good night."}]
"""Of a task. The model says the same to both: half of it is right."""


def evaluated(folder: str, command: list[str], report: str) -> Any:
    """Run a program that writes scores of QUESTIONS into a folder, without the network, and return them."""
    Path(folder, "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    environment = {**os.environ, "HOME": folder, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command[0] = str(Path(sys.executable).with_name(command[0]))
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    for file in Path(folder).glob(report):
        return json.loads(file.read_text())
    raise RuntimeError(done.stdout + done.stderr)


def lm_eval(case: str, url: str, key: str) -> str:
    task = {
        "task": "greet", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "test.jsonl"}},
        "test_split": "test", "output_type": "generate_until", "doc_to_text": "{{query}}",
        "doc_to_target": "{{response}}", "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    os.environ["OPENAI_API_KEY"] = key
    model = f"model={MODEL},base_url={url}/v1/chat/completions,max_retries=1"
    command = ["lm_eval", "run", "--model", "local-chat-completions", "--model_args", model, "--apply_chat_template"]
    command += ["--tasks", "greet", "--include_path", ".", "--output_path", "out"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "greet.yaml").write_text(json.dumps(task))
        scores = evaluated(folder, command, "out/**/results_*.json")
    return str(scores["results"]["greet"]["exact_match,none"])


def evalscope(case: str, url: str, key: str) -> str:
    command = ["evalscope", "eval", "--model", MODEL, "--api-url", f"{url}/v1", "--api-key", key]
    command += ["--eval-type", "openai_api", "--datasets", "general_qa", "--work-dir", "out", "--no-timestamp"]
    command += ["--generation-config", '{"retries": 1}']
    with tempfile.TemporaryDirectory() as folder:
        local = {"general_qa": {"local_path": folder, "subset_list": ["test"]}}
        report = evaluated(folder, [*command, "--dataset-args", json.dumps(local)], "out/reports/**/*.json")
    main = report["primary_metric_identity"]
    return str(next(metric["score"] for metric in report["metrics"] if metric["identity"] == main))


def main() -> None:
    client, case, url, key = sys.argv[1:]
    try:
        said, error = globals()[client](case, url, key), ""
    except Exception as failed:
        said, error = "", f"{type(failed).__name__}: {failed}"
    print("\n" + json.dumps({"said": said, "called": CALLED, "error": error}))


if __name__ == "__main__":
    main()
