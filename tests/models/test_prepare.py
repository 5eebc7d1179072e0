"""The one recipe that makes a model ready to serve."""

from pathlib import Path

import pytest

from qwen_vllm.models.checks import ModelUnavailable
from qwen_vllm.models.prepare import read_chat_template


def test_a_chat_template_is_a_file_or_its_text(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages }}")
    assert read_chat_template(str(file)) == read_chat_template("{{ messages }}") == "{{ messages }}"
    assert read_chat_template(None) is None
    with pytest.raises(ModelUnavailable, match=r"--chat-template .*missing.jinja: neither a file"):
        read_chat_template(str(tmp_path / "missing.jinja"))
