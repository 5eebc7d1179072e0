"""Documents of a question: what is read of them, what is said where nothing is, and what the model is asked."""

import asyncio
import json
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import docx
import pytest

from gradio_webui import Page
from qwen_vllm.webui import documents, reader
from qwen_vllm.webui.answering import WaitingLine
from qwen_vllm.webui.conversation import asked_text_of, documents_of, framed, question, text_message, text_of, unframed
from qwen_vllm.webui.reader import Unreadable, read
from qwen_vllm.words import WORDS
from tests.support.chat_messages import kept_settings
from tests.support.documents import pdf
from tests.support.scripted_server import Server, line

EN = WORDS["en"]
CHINESE = "第一季度营收为 12.4 亿元。\n姓名,城市\n张三,北京"
INFO = {"models": ["m"], "context": 1000, "images": False, "defaults": {"max_tokens": 200}}


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    return tmp_path


def word_file(path: Path) -> Path:
    """A heading, a table between paragraphs, and a tracked change."""
    document = docx.Document()
    document.add_heading("合同", 1)
    changed = document.add_paragraph("Price: ")
    run = changed.add_run("20 yuan")
    inserted = changed._p.makeelement(f"{reader._W}ins", {})
    inserted.append(run._r)
    changed._p.append(inserted)
    deleted = changed.add_run("10 yuan")._r
    deleted.find(f"{reader._W}t").tag = f"{reader._W}delText"
    table = document.add_table(2, 2)
    for cell, text in zip(table._cells, ["item", "项目", "1", "a\tb"], strict=True):
        cell.text = text
    document.add_paragraph("End")
    document.save(str(path))
    return path


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        (CHINESE, "utf-8"),
        (CHINESE, "utf-8-sig"),
        (CHINESE, "utf-16"),
        (CHINESE, "gb18030"),
        ("你好，世界。", "gb18030"),
        ("café, déjà vu, größer", "cp1252"),
        ("日本語のテキストです。", "shift_jis"),
        ("# Title\n\n```python\n\tprint(1)\n```", "utf-8"),
        ("BMW sold 1 car.\nA PDF begins with %PDF-1.7", "utf-8"),
    ],
)
def test_text_is_read_in_its_encoding(tmp_path: Path, content: str, encoding: str) -> None:
    file = tmp_path / "notes.txt"
    file.write_bytes(content.replace("\n", "\r\n").encode(encoding))
    assert read(file) == content


def test_a_pdf_is_read_page_by_page(tmp_path: Path) -> None:
    file = tmp_path / "report.pdf"
    file.write_bytes(pdf("第一页：营收\nsecond line", "Page two"))
    assert read(file) == "第一页：营收\nsecond line\n\nPage two"


def test_radicals_in_a_pdf_become_the_characters_that_they_look_like(tmp_path: Path) -> None:
    file = tmp_path / "report.pdf"
    file.write_bytes(pdf("\u2f00\u2f06 ①"))
    assert read(file) == "一二 ①"


def test_a_word_file_is_read_in_order_with_its_tables_and_its_insertions(tmp_path: Path) -> None:
    text = "合同\nPrice: 20 yuan\n| item | 项目 |\n| 1 | a\tb |\nEnd"
    assert read(word_file(tmp_path / "contract.docx")) == text


def archive(*names: str) -> bytes:
    path = Path("archive")
    with zipfile.ZipFile(path, "w") as parts:
        for name in names:
            parts.writestr(name, "<a/>")
    return path.read_bytes()


UNREADABLE = {
    "a PDF with a password": (lambda: pdf("x", encrypted=True), "document_encrypted"),
    "a scan": (lambda: pdf(""), "document_scanned"),
    "half a PDF": (lambda: pdf("x")[:60], "document_broken"),
    "too many pages": (lambda: pdf("a", "b", "c"), "document_pages"),
    "an old Word file": (lambda: b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "document_old"),
    "a ZIP file": (lambda: archive("a.txt"), "document_unknown"),
    "no Word file inside": (lambda: archive("word/document.xml"), "document_broken"),
    "a program": (lambda: b"\x7fELF\x02\x01\x01\0\0\0", "document_unknown"),
    "an image": (lambda: b"\x89PNG\r\n\x1a\n\0\0", "image_refused"),
    "nothing": (lambda: b"", "document_empty"),
    "white space": (lambda: b" \r\n\t", "document_empty"),
    "a large file": (lambda: b"a" * 5001, "document_large"),
    "many characters": (lambda: b"a" * 4001, "document_long"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_without_text_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for limit, value in {"MAX_BYTES": 5000, "MAX_CHARACTERS": 4000, "MAX_PAGES": 2}.items():
        monkeypatch.setattr(reader, limit, value)
    monkeypatch.chdir(tmp_path)
    make, why = UNREADABLE[name]
    file = tmp_path / "file"
    file.write_bytes(make())
    with pytest.raises(Unreadable, match=f"^{why}$"):
        read(file)
    for words in WORDS.values():
        assert words[why].format(**documents.LIMITS)


def test_a_word_file_that_is_large_when_unpacked_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = word_file(tmp_path / "contract.docx")
    with zipfile.ZipFile(file) as parts:
        monkeypatch.setattr(reader, "MAX_UNPACKED", sum(part.file_size for part in parts.infolist()) - 1)
    with pytest.raises(Unreadable, match="document_unpacked"):
        read(file)


def test_a_document_comes_back_from_its_question_as_it_was() -> None:
    text = "a *b* <b> $x$ \u2060\n````\n3~5\n```\n</details>\n<details><summary>x</summary>"
    [message] = question([], "What is <b>?", [framed("a <b>.md", text), framed("b.txt", "x")])
    first, second = json.loads(unframed(message))
    assert (first["name"], first["text"], second["text"]) == ("a <b>.md", text, "x")
    assert asked_text_of(message) == "What is <b>?"
    assert f"<summary>a <b>.md</summary>\n\n`````\n{text}\n`````\n\n</details>" in text_of(message)
    assert documents_of(text_message("user", framed("a", "b"))) == []  # a person wrote it


class Tab:
    """A person's tab: what is attached, and what the page shows of it."""

    def __init__(self, server: Server) -> None:
        self.page = Page(server.url, "key", None, None, WaitingLine(1, 1))
        self.dropped, self.known, self.agreed = [], "[]", False
        asyncio.run(self.page.greet(self.request))

    request = SimpleNamespace(session_hash="ada", headers={"accept-language": "en"})

    def drop(self, *files: Path) -> tuple[list[str], dict[str, Any], str]:
        """The cards, the question whether to cut, and what is told."""
        self.dropped += [{"id": str(file), "name": file.name} for file in files]
        known, cards, cut, told = asyncio.run(self.page.attach(*self._sent("")))
        self.known = known
        return [card for card, _ in cards["choices"]], cut, told

    def ask(self, text: str) -> list[Any]:
        """(the turn that begins, what is told)."""
        _, running, *_, told = asyncio.run(self.page.begin(*self._sent(text)))
        return [running, told]

    def _sent(self, text: str) -> list[Any]:
        asked = {"text": text, "files": []}
        return [asked, json.dumps(self.dropped), self.known, self.agreed, kept_settings(), self.request]


@pytest.fixture
def tab(server: Server, uploads: Path) -> Tab:
    server.play(line(INFO), path="/chat/info")
    server.play(line({"count": 700, "tokens": []}), path="/tokenize")
    return Tab(server)


def test_documents_are_shown_with_the_servers_count_and_asked(tab: Tab, server: Server, uploads: Path) -> None:
    server.play(line({"count": 1, "tokens": []}), path="/tokenize")
    (uploads / "a.md").write_text("# 标题")
    (uploads / "b.pdf").write_bytes(pdf("Two"))
    tab.drop(uploads / "a.md")
    assert tab.drop(uploads / "b.pdf")[0] == ["📄 a.md · 1 tokens", "📄 b.pdf · 1 tokens"]
    assert [body["prompt"] for path, _, body in server.requests if path == "/tokenize"] == ["# 标题", "Two"]
    [asked], _ = tab.ask("And?")
    frames = [
        f"<details><summary>{name}</summary>\n\n```\n{text}\n```\n\n</details>"
        for name, text in (("a.md", "# 标题"), ("b.pdf", "Two"))
    ]
    assert text_of(asked) == "\n\n".join([*frames, "And?"])


def test_what_does_not_fit_is_sent_only_where_the_person_agrees(tab: Tab, server: Server, uploads: Path) -> None:
    (uploads / "long.txt").write_text("abcdefg" * 100)
    server.play(line({"count": 1400, "tokens": []}), path="/tokenize")
    server.then_play(line({"count": 690, "tokens": []}), path="/tokenize")
    _, cut, _ = tab.drop(uploads / "long.txt")
    assert cut["visible"]
    assert cut["label"] == "1,400 tokens, and the context has 1,000: send only the first 734 or so"
    turn, told = tab.ask("And?")
    assert (turn, told) == ({"__type__": "update"}, EN["documents_unsent"])
    tab.agreed = True
    [asked], _ = tab.ask("And?")
    assert "long.txt (the first 690 of 1,400 tokens)" in text_of(asked)
    assert "abcdefg" * 52 in text_of(asked)
    assert "abcdefg" * 53 not in text_of(asked)


def test_without_the_servers_count_there_is_an_estimate(tab: Tab, server: Server, uploads: Path) -> None:
    server.play(line({"error": "no such route"}), status=404, path="/tokenize")
    (uploads / "a.txt").write_text("字" * 100)
    assert tab.drop(uploads / "a.txt")[0] == ["📄 a.txt · 76 tokens"]


def test_a_file_that_fails_is_told_and_the_others_stay(tab: Tab, uploads: Path) -> None:
    (uploads / "good.txt").write_text("good")
    (uploads / "locked.pdf").write_bytes(pdf("x", encrypted=True))
    cards, _, told = tab.drop(uploads / "good.txt", uploads / "locked.pdf")
    assert cards == ["📄 good.txt · 700 tokens"]
    assert told == f"⚠️ **locked.pdf**: {EN['document_encrypted']}"


def test_a_question_waits_where_a_failure_was_not_seen_yet(tab: Tab, uploads: Path) -> None:
    tab.dropped = [{"id": str(uploads / "gone.txt"), "name": "gone.txt"}]
    turn, told = tab.ask("And?")
    assert turn == {"__type__": "update"}
    assert told == f"⚠️ **gone.txt**: {EN['document_gone']}"


@pytest.mark.parametrize("path", ["secret.txt", "up/../secret.txt", "up/link.txt"])
def test_no_file_but_an_upload_is_read(tab: Tab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    (tmp_path / "up").mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "up"))
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "up/link.txt").symlink_to(tmp_path / "secret.txt")
    assert EN["document_gone"] in tab.drop(tmp_path / path)[2]


def test_reading_that_takes_too_long_is_ended(tab: Tab, uploads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = uploads / "slow.py"
    slow.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(reader, "__file__", str(slow))
    monkeypatch.setattr(reader, "MAX_SECONDS", 0.5)
    (uploads / "a.txt").write_text("a")
    assert EN["document_slow"].format(**documents.LIMITS) in tab.drop(uploads / "a.txt")[2]


def test_a_question_has_so_many_documents_at_most(tab: Tab, uploads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_DOCUMENTS", 1)
    for name in ("a.txt", "b.txt"):
        (uploads / name).write_text(name)
    cards, _, told = tab.drop(uploads / "a.txt", uploads / "b.txt")
    assert (len(cards), "b.txt" in told) == (1, True)
