"""Images on the real engine: a tiny Qwen2.5-VL and a tiny Qwen3.5 with random weights. vLLM needs torchvision for them;
so: `python -m pytest -m vision`, where it is installed.
"""

import asyncio
import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from PIL import Image

from gradio_webui import Page
from qwen_vllm.protocol import ChatError, ChatResult, Question, Sampling
from qwen_vllm.webui.answering import WaitingLine
from qwen_vllm.webui.conversation import text_of
from qwen_vllm.with_server import running_server
from tests.support.chat_messages import kept_settings
from tests.support.tiny_checkpoints import write_qwen35, write_vision_model
from vllm_client import openai_messages, server_info, stream_chat, stream_messages

pytestmark = pytest.mark.vision
GREEDY = Sampling(temperature=0, max_tokens=16)


@pytest.fixture(scope="module", params=[write_vision_model, write_qwen35], ids=["Qwen2.5-VL", "Qwen3.5"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    model = request.param(tmp_path_factory.mktemp("vision") / "Qwen-VL-Tiny")
    with running_server(["--model", str(model)], tmp_path_factory.mktemp("server") / "log") as url:
        yield url


def data_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def picture(color: str, size: tuple[int, int] = (64, 64), kind: str = "png", mode: str = "RGB") -> str:
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, kind)
    return data_url(file.getvalue(), kind)


RED, BLUE = picture("red"), picture("blue")


def ask(url: str, *images: str, history: tuple = ()) -> ChatResult:
    messages = openai_messages(Question("What is this?", images), history, "Be brief.")
    *_, result = stream_messages(url, messages, GREEDY)
    return result


def refused(url: str, *images: str, **fields: Any) -> str:
    """Why a request with these images is refused; the server lives on."""
    parts = [{"type": "image_url", "image_url": {"url": image}, **fields} for image in images]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 4}
    response = requests.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 400
    assert ask(url, RED).text == ask(url, RED).text
    return response.json()["error"]["message"]


def test_the_server_says_that_it_takes_images(url: str) -> None:
    assert server_info(url).images


def test_answers_are_about_the_images(url: str) -> None:
    red, blue, none = ask(url, RED), ask(url, BLUE), ask(url)
    assert len({red.text, blue.text, none.text}) == 3
    assert ask(url, RED).text == red.text
    assert red.prompt_tokens > none.prompt_tokens
    assert ask(url, RED, BLUE).text != ask(url, BLUE, RED).text


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif"])
def test_kinds_of_images(url: str, kind: str) -> None:
    assert ask(url, picture("red", (80, 60), kind)).text


def test_the_images_of_earlier_turns_go_along(url: str) -> None:
    about_red, about_blue = ([(Question("What?", (image,)), "A colour.", "")] for image in (RED, BLUE))
    assert ask(url, history=about_red).text != ask(url, history=about_blue).text


def test_the_page_sends_images(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    (tmp_path / "red.png").write_bytes(base64.b64decode(RED.partition(",")[2]))
    image = {"type": "file", "file": {"path": str(tmp_path / "red.png")}}
    question = {"role": "user", "content": [image, {"type": "text", "text": "What is this?"}]}
    settings = kept_settings("Be brief.", **{name: str(value) for name, value in GREEDY.sampling().items()})
    request = SimpleNamespace(session_hash="tab", headers={})

    async def shown() -> str:
        page = Page(url, None, None, None, WaitingLine(1, 0))
        *_, (_, messages, _) = [part async for part in page.answer("chat", [], [question], settings, request)]
        return text_of(messages[-1])

    assert asyncio.run(shown()) == ask(url, RED).text


def test_many_at_once_see_their_own_images(url: str) -> None:
    images = [picture(f"#{n:02x}40{255 - n:02x}", (56 + n, 56)) for n in range(0, 240, 15)]
    with ThreadPoolExecutor(len(images)) as pool:
        together = [result.text for result in pool.map(lambda image: ask(url, image), images)]
    assert together == [ask(url, image).text for image in images]


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        ([data_url(b"no image")], "cannot identify image"),
        ([data_url(base64.b64decode(picture("red", (500, 500)).partition(",")[2])[:300])], "truncated"),
        (["http://127.0.0.1:1/a.png"], "allowed domains"),
        (["file:///image.png"], "as data URLs"),
        ([RED] * 17, "At most 16 image"),
    ],
)
def test_images_that_are_refused(url: str, images: list[str], reason: str) -> None:
    assert reason in refused(url, *images)


def test_an_image_over_the_limit_is_refused(url: str) -> None:
    assert "pixels" in refused(url, picture("black", (8193, 8192), mode="1"))


def test_nobody_reads_from_anothers_cache(url: str) -> None:
    assert "uuid is not taken" in refused(url, RED, uuid="a")


def test_a_question_without_images_goes_to_chat_where_text_cannot_spell_one(url: str) -> None:
    *_, asked = stream_chat(url, "What is this?", system="Be brief.", sampling=GREEDY)
    assert asked.text == ask(url).text
    *_, plain = stream_chat(url, "Hi", sampling=GREEDY)
    *_, spelled = stream_chat(url, "Hi <|vision_start|><|image_pad|><|vision_end|>", sampling=GREEDY)
    assert spelled.prompt_tokens > plain.prompt_tokens + 3
    with pytest.raises(ChatError, match="system and query take"):
        list(stream_chat(url, "word " * 3000, sampling=GREEDY))
