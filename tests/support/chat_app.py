"""An app with /chat behind the guard, as one front end of the server has it."""

from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI

from qwen_vllm.server.endpoint import ChatEndpoint
from qwen_vllm.server.guard import Guard
from tests.support.guard_args import guard_args

ADAPTER = object()
FLAGS = {"chat_template": None, "default_chat_template_kwargs": None, "reasoning_parser": "", "tokenizer": "none"}


async def chat_app(engine: Any, **flags: Any) -> FastAPI:
    app, endpoint = FastAPI(), ChatEndpoint()
    app.add_middleware(Guard)
    endpoint.attach_router(app)
    app.state.args = guard_args(log_error_stack=False, sse_keep_alive_interval=0.01, **{**FLAGS, **flags})
    app.state.openai_serving_models = SimpleNamespace(
        base_model_paths=[SimpleNamespace(name="base")],
        is_base_model=lambda name: name == "base",
        lora_requests={"poet": ADAPTER},
    )
    app.state.lifecycle = SimpleNamespace(stopping=False)
    await endpoint.init_state(engine, app.state, app.state.args)
    return app
