"""What the page's Markdown is given: nothing is lost, and the marks are where they should be."""

import pytest

from qwen_vllm.webui.markdown import JOINER, SPACE, shown, written
from tests.support.answers import SEEN


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        ("vector<int> 1 < 2", "vector<+int> 1 < 2"),
        ("</p><!-- x --><?y?>", "<+/p><+!-- x --><+?y?>"),
        ("a<br>b<br />H<sub>2</sub>O", "a<br>b<br />H<sub>2</sub>O"),
        ("<sub onclick=x>", "<+sub onclick=x>"),
        ("`<b>` <b>", "`<b>` <+b>"),
        ("```\n<b>`\n```\n<b>", "```\n<b>`\n```\n<+b>"),
        ("```\n<b>", "```\n<b>"),
        ("\\`<b>`", "\\`<+b>`"),
        ("3~5 $a<b$", "3~_5 $+a<b+$"),
        ("\\[ a \\[b\\\\[2pt]\\] \\( c \\(d\\)", "\\[ a \\[+b\\\\[2pt]+\\] \\( c \\(+d+\\)"),
    ],
)
def test_the_marks_stand_outside_of_code(text: str, marked: str) -> None:
    assert shown(text).replace(JOINER, "+").replace(SPACE, "_") == marked


@pytest.mark.parametrize("text", [*SEEN, f"{SPACE}BOM, {JOINER}{JOINER} <{JOINER}b> 3~{SPACE}5", "a\r\nb\u2028<c>", ""])
def test_what_was_written_comes_back_to_the_character(text: str) -> None:
    assert written(shown(text)) == text
