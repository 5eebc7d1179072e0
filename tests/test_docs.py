"""The pages: links and modules that they name exist, and a Chinese page has the structure of its English twin."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks/NOTES.md"])
CHINESE = [page for page in PAGES if page.name.endswith(".zh-CN.md")]


def text_of(page: Path) -> str:
    """A page without its blocks of code and its comments."""
    return re.sub(r"```.*?```|<!--.*?-->", "", page.read_text(), flags=re.DOTALL)


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def structure_of(page: Path) -> list[str]:
    """The levels of a page's headings, and its list items, in order."""
    return re.findall(r"^(#+|- )", text_of(page), flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_points_to_exists(page: Path) -> None:
    for link in re.findall(r"\]\((?!http)([^)]+)\)", text_of(page)):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link
    for module in re.findall(r"python -m ((?:benchmarks|docs|qwen_vllm)\.\w+)", page.read_text()):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module


@pytest.mark.parametrize("page", CHINESE, ids=lambda page: page.name)
def test_a_chinese_page_is_built_like_its_twin(page: Path) -> None:
    twin = page.with_name(page.name.replace(".zh-CN", ""))
    assert structure_of(page) == structure_of(twin)
