"""The offline program's flags and exit statuses, with the scripted model of the batch tests."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

import vllm_offline
from qwen_vllm import console
from qwen_vllm.models.checks import ModelUnavailable
from qwen_vllm.protocol import DEFAULT_SYSTEM, ChatError, ChatResult, Reasoning, ServerInfo
from tests.support.scripted_model import ScriptedModel, texts, write


@pytest.fixture
def files(tmp_path):
    write(tmp_path / "rows.jsonl", {"query": "a", "answer": "A"}, {"query": "b", "answer": "no"}, {"query": "c"})
    return tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"


@pytest.fixture
def run(files, monkeypatch):
    """Runs the program on the files; returns its exit status."""

    def run(*flags: str, model: ScriptedModel | Exception | None = None) -> int:
        def load(*_):
            if isinstance(model, Exception):
                raise model
            return model or ScriptedModel()

        monkeypatch.setattr(vllm_offline, "_load", load)
        return vllm_offline.main(["--input", str(files[0]), "--output", str(files[1]), *flags])

    return run


def test_a_file_is_answered_and_the_summary_printed(files, run, capsys):
    model = ScriptedModel()
    assert run("--ordered", "--reference", "answer", "--system", "S", "--temperature", "0", model=model) == 0
    assert list(texts(files[1]).values()) == ["A", "B", "C"]
    assert model.requests[0]["system"] == "S"
    assert model.sampling.sampling() == {"temperature": 0}
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert (summary["answered"], summary["failed"], summary["scores"]["exact_match"]) == (3, 0, 0.5)
    assert "answered 3 · answered before 0 · failed 0" in err
    assert "exact match 0.5" in err


def test_a_file_is_answered_in_chinese_with_the_same_rows_and_the_same_summary(files, run, capsys, monkeypatch):
    assert run() == 0
    written, summary = files[1].read_bytes(), json.loads(capsys.readouterr().out)
    files[1].unlink()
    assert run("--lang", "zh") == 0
    out, err = capsys.readouterr()
    assert files[1].read_bytes() == written
    assert json.loads(out) | {"seconds": 0} == summary | {"seconds": 0}
    assert "已回答 3 · 之前已回答 0 · 失败 0 · 已不在输入中 0 · 提示词元 27 · 生成词元 6 · 秒数 " in err
    assert run("--lang", "zh", model=ChatError("the engine has died", "engine_error")) == 0  # there is nothing to do
    files[1].unlink()
    model = ScriptedModel({"b": ChatError("the engine has died", "engine_error")})
    assert run("--lang", "zh", model=model) == 1
    assert "。完成的部分已保留，再次运行同一命令即可接着做\n" in capsys.readouterr().err
    files[0].write_text("[{")
    assert run("--lang", "zh") == 2
    assert capsys.readouterr().err.endswith("是 JSON 数组，不是 JSONL：请每行写一个问题（jq -c '.[]'）\n")


@pytest.mark.parametrize(("flags", "system"), [([], None), (["--system", DEFAULT_SYSTEM], DEFAULT_SYSTEM)])
def test_the_default_system_prompt_counts_for_rows_in_openais_form_where_it_is_typed(files, run, flags, system):
    files[0].write_text('{"messages": [{"role": "user", "content": "b"}]}\n')
    model = ScriptedModel()
    assert run(*flags, model=model) == 0
    assert [request["system"] for request in model.requests] == [system]


@pytest.mark.parametrize(
    "model, status, message",
    [
        (ScriptedModel({"b": ChatError("query: too long")}), 1, "failed 1"),
        (ScriptedModel({"b": ChatError("the engine has died", "engine_error")}), 1, "What is done is kept"),
        (ScriptedModel({"b": OSError(28, "No space left on device")}), 1, "No space left on device. "),
        (ScriptedModel({"b": KeyboardInterrupt()}), 130, "run the same again to go on"),
        (ModelUnavailable("x is no model"), 1, "x is no model"),
    ],
)
def test_how_a_run_ends(files, run, capsys, model, status, message):
    assert run(model=model) == status
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert run() == 0
    assert len(texts(files[1])) == 3


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--input", "rows.jsonl"], "--input and --output go together"),
        (["--output", "answers.jsonl"], "--input and --output go together"),
        (["--input", "none.jsonl", "--output", "a.jsonl"], "cannot read none.jsonl"),
        (["--input", "a", "--output", "b", "--prompt", "Hi"], "--prompt does not go with --input"),
        (["--ordered"], "need --input"),
        (["--prompt", "Hi", "--reference", "answer"], "need --input"),
        (["--prompt", "Hi", "--temperature", "hot"], "temperature"),
        (["--prompt", "Hi", "--lora-modules", "poet"], "has the form NAME=FOLDER"),
        (["--default-chat-template-kwargs", "[]"], "--default-chat-template-kwargs: must be a JSON object"),
        (["--default-chat-template-kwargs", "{"], "--default-chat-template-kwargs: must be a JSON object"),
    ],
)
def test_wrong_usage_is_said_before_a_model_is_loaded(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vllm_offline, "_load", lambda *_: pytest.fail("loaded a model"))
    try:
        status = vllm_offline.main(flags)
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_adapters_are_named_with_their_folders(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    args, engine_flags = vllm_offline.parse_args(["--lora-modules", "poet=./poet", "b=~/a=b", "--max-lora-rank", "32"])
    assert args.lora_modules == [("poet", "poet"), ("b", "/home/ada/a=b")]
    assert engine_flags == ["--max-lora-rank", "32"]


def test_flags_may_be_spelled_with_underscores():
    flags = [
        "--model_path=./my_model",
        "--max_tokens",
        "9",
        "--lora_modules",
        "a_b=c_d",
        "--max_num_seqs=4",
        "--system",
        "a_b",
    ]
    args, engine_flags = vllm_offline.parse_args(flags)
    assert (args.model_path, args.max_tokens, args.system) == ("./my_model", "9", "a_b")
    assert (args.lora_modules, engine_flags) == ([("a_b", "c_d")], ["--max-num-seqs=4"])


def test_a_chat_template_reaches_the_model(monkeypatch, tmp_path):
    loaded = []
    monkeypatch.setattr(vllm_offline, "LOG", tmp_path / "log")
    monkeypatch.setattr(vllm_offline, "resolve_model", lambda name, *_: name)
    monkeypatch.setattr(vllm_offline, "_engine_args", lambda flags: {"flags": flags})
    monkeypatch.setattr("vllm_wrapper.ChatModel", lambda model, **args: loaded.append((model, args)) or ScriptedModel())
    monkeypatch.setattr(ScriptedModel, "no_chat", None, raising=False)
    options = ["--default-chat-template-kwargs", '{"preserve_thinking": true}']
    given = ["--model", "m", "--chat-template", "mine.jinja", "--max-model-len", "9", *options]
    vllm_offline._load(*vllm_offline.parse_args(given))
    wanted = {"chat_template": "mine.jinja", "chat_template_options": {"preserve_thinking": True}, "adapters": {}}
    assert loaded == [("m", {"flags": ["--max-model-len", "9"], "download_dir": None, **wanted})]


def test_the_log_has_all_that_was_said_while_the_model_was_loaded(monkeypatch, tmp_path):
    made_first = []

    def parse(flags):
        print("said first")
        made_first.append(sys.stdout)  # as vLLM's log handler, which is made when vLLM is imported
        return {}

    def load(model, **args):
        print("said then", file=made_first[0])
        print("said last")
        return SimpleNamespace(no_chat=None)

    monkeypatch.setattr(vllm_offline, "LOG", tmp_path / "log")
    monkeypatch.setattr(vllm_offline, "resolve_model", lambda name, *_: name)
    monkeypatch.setattr(vllm_offline, "_engine_args", parse)
    monkeypatch.setattr("vllm_wrapper.ChatModel", load)
    vllm_offline._load(*vllm_offline.parse_args(["--model", "m"]))
    assert (tmp_path / "log").read_text() == "said first\nsaid then\nsaid last\n"


def test_the_chat_knows_the_levels_of_reasoning_effort(monkeypatch):
    told = []
    model = SimpleNamespace(adapters={"poet": None}, reasoning_efforts=["low", "xhigh"])
    monkeypatch.setattr(vllm_offline, "_load", lambda *_: model)
    monkeypatch.setattr(console, "run", lambda ask, title, args, info: told.append(info()) or 0)
    assert vllm_offline.main(["--model", "m"]) == 0
    assert told == [ServerInfo(["m", "poet"], reasoning_efforts=["low", "xhigh"])]


TRANSCRIPTS = {
    "en": """\
m, offline
/help lists the commands, Ctrl-D leaves.
Hm

Hello
first token 0.00 s · tokens/s · 2 tokens, 1 of them thoughts · cut at the token limit
* default
  low
  xhigh
There is no effort high, only default, low, xhigh.
temperature = 0.5
There is no parameter top, only …
No image is attached.
m takes no images.
> Hi
Hello
/load none.json: No such file or directory
Name a file: /save FILE, /load FILE.
There is nothing to answer again.
""",
    "zh": """\
m，离线
输入 /help 列出命令，按 Ctrl-D 退出。
Hm

Hello
首个词元 0.00 秒 · 词元/秒 · 2 词元（其中思考 1） · 达到词元上限，已截断
* default
  low
  xhigh
没有 high 这一级，只有 default, low, xhigh。
temperature = 0.5
没有参数 top，只有 …
没有附上图片。
m 不支持图片。
> Hi
Hello
/load none.json: No such file or directory
请写明文件：/save FILE、/load FILE。
还没有可以重新回答的问题。
""",
}


@pytest.mark.parametrize("language", TRANSCRIPTS)
def test_the_chat_in_each_language(monkeypatch, tmp_path, capsys, language):
    def stream_chat(query, history, system, sampling):
        yield Reasoning("Hm")
        yield "Hello"
        yield ChatResult("Hello", [*history, (query, "Hello")], "length", None, 9, 2, 0, "Hm", 1)

    model = SimpleNamespace(adapters={}, reasoning_efforts=["low", "xhigh"], stream_chat=stream_chat)
    monkeypatch.setattr(vllm_offline, "_load", lambda *_: model)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr(console, "LINE_HISTORY", tmp_path / "lines")
    monkeypatch.chdir(tmp_path)
    typed = ["Hi", "/effort", "/effort high", "/set temperature 0.5", "/set top 1", "/image", "/image a.png"]
    typed += ["/history", "/load none.json", "/save", "/clear", "/regen", "/exit"]
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        pipe.send_text("".join(f"{line}\r" for line in typed))
        assert vllm_offline.main(["--model", "m", "--lang", language]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    shown = re.sub(r"\x1b\[\dm|[\d.]+ (?=tokens/s|词元/秒)", "", out)
    assert (
        re.sub(r"(only |只有 )max_tokens.*", r"\1…", re.sub(r"\d\.\d\d (s|秒)", r"0.00 \1", shown))
        == TRANSCRIPTS[language]
    )
