"""Log files: new each time, and shown on request."""

import time
from pathlib import Path

import pytest

from qwen_vllm.cache import open_log


def test_a_log_replaces_the_last_one_and_is_not_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "logs" / "a.log"
    for text in ("first\n", "second\n"):
        with open_log(path, shown=False) as log:
            log.write(text)
            assert path.read_text() == text
    assert capfd.readouterr() == ("", "")


def test_a_log_that_is_shown_goes_to_stderr_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, shown = tmp_path / "a.log", ""
    path.write_text("last time\n")
    with open_log(path, shown=True) as log:
        assert path.read_text() == ""
        log.write("你好\n")
    deadline = time.monotonic() + 10
    while (path.read_text(), shown) != ("你好\n", "你好\n") and time.monotonic() < deadline:
        shown += capfd.readouterr().err
        time.sleep(0.01)
    assert (path.read_text(), shown) == ("你好\n", "你好\n")
