"""Prepares text for the page's Markdown: what is shown is what was written.

The page's Markdown comes with Gradio. It strikes out ranges (3~5, 10~20), takes sums of money for formulas, and knows
no words without spaces. Invisible characters in the text keep it from that; `written` takes them out again.
"""

import re
from itertools import pairwise

from markdown_it import MarkdownIt

JOINER, SPACE = "\u2060", "\ufeff"
"""Two invisible characters. To Markdown the first is a letter, the second is white space."""
LATEX: list[dict[str, str | bool]] = [
    {"left": left + JOINER, "right": JOINER + right, "display": display}
    for left, right, display in (("$$", "$$", True), ("\\[", "\\]", True), ("\\(", "\\)", False), ("$", "$", False))
]
"""What begins and ends a formula on the page: `shown` adds the joiners to what is one."""

_BLOCKS = MarkdownIt("commonmark", {"html": False}).disable("inline")
_LEFT, _RIGHT = "([{<（［｛〈《「『【〔“‘", ")]}>）］｝〉》」』】〕”’,.:;!?，。：；！？、"
_PROSE = re.compile(
    r"""(?=[\\`$<~*_\[\]hfw])(?:
    (?P<block_math> \$\$(?!\$)(?:(?!\n\s*\n)[^$`])+\$\$(?!\$)
        | \\\[(?:[^\\\n]|\\[^\[\]\n]|\\?\n(?!\s*\n))++\\\]
        | \\\((?:[^\\\n]|\\[^()\n]|\\?\n(?!\s*\n))++\\\) )
    # A formula in dollars touches them; or it has spaces at both ends, and signs of a formula.
    # Sums of money with words between them are none, and no variables of a shell.
    | (?P<math> (?<![A-Za-z0-9$])\$
        (?![\d.,]+[^\\^_={}<>$\n]*(?:[，。；！？“”]|(?:[一-鿿]|\ [A-Za-z]{2})[^\\^_={}<>$\n]*\d\$))
        (?![{(][^$\n]*\$[{(])
        (?:[^\s$`](?:[^$`\n]*[^\s$`\\])? | \ (?:[A-Za-z]|[^$`\n]*[\\^_={}][^$`\n]*)\ )
        \$(?:(?![A-Za-z0-9$])|(?=(?:st|nd|rd|th|s)(?![A-Za-z]))) )
    | (?P<as_is> \\[^\w\s]
        | (?<!`)(?P<ticks>`+)(?!`)[^\n|]*?(?<!`)(?P=ticks)(?!`)
        | \]\((?:[^()\s]|\([^()\s]*\))*(?:[ ]+"[^"\n]*")?\)
        | <(?:br\ ?/?|/?su[bp]|(?:https?://|mailto:)[^\s<>]+|[\w.+-]+@[\w.-]+)> )
    | (?P<tag> <(?=[a-zA-Z/!?]) )
    | (?P<link> (?:(?:https?|ftp)://|www\.)[^\s<|`*"\x80-\U0010ffff]+(?=[^\s\x00-\x7f])? )
    | (?P<definition> (?<![^\n ])\[[^\]\n]+\](?=:) )
    | (?P<product> (?<=[A-Za-z0-9])\*{1,2}(?=[A-Za-z0-9]) | (?<!\w)__(?=[a-z]\w*__(?!\w)) )
    | (?P<strike> (?:(?<!\w)~~(?![\s~])|~~(?=\w))(?:(?!~~|\n\s*\n).)+(?:(?<=\w)~~(?!~)|(?<![\s~])~~(?![\w~])) )
    | (?P<tildes> ~+ )
    | (?P<emphasis> (?P<stars>\*{1,3})(?![\s*])(?>`[^`\n]*`|\$[^$\n]*\$|(?!\n\s*\n)[^*])+(?<![\s*])
        (?P=stars)(?:(?!\*)|(?<=\*\*)(?=\*(?!\*))) )
    )""",
    re.VERBOSE | re.DOTALL,
)


def shown(text: str) -> str:
    """Return Markdown that shows `text`: HTML as it is written, apart from line breaks, sub- and superscript."""
    lines = re.sub(f"[{JOINER}{SPACE}]", r"\g<0>\g<0>", text).split("\n")
    blocks = [block.map for block in _BLOCKS.parse("\n".join(lines)) if block.type in ("fence", "code_block")]
    for (_, start), (end, _) in pairwise([[0, 0], *filter(None, blocks), [len(lines), 0]]):
        if start < end:
            lines[start:end] = _PROSE.sub(_shown, "\n".join(lines[start:end])).split("\n")
    return "\n".join(lines).replace('src="/file', f'src="{JOINER}/file')  # Gradio would put its own address there


def written(text: str) -> str:
    """Return what was given to `shown`."""
    return re.sub(f"([{JOINER}{SPACE}])(\\1?)", r"\2", text)


def _shown(match: re.Match[str]) -> str:
    text = match[0]
    match match.lastgroup:
        case "block_math":
            return text[:2] + JOINER + text[2:-2] + JOINER + text[-2:]
        case "math":
            return f"${JOINER}{text[1:-1]}{JOINER}$"
        case "tag":
            return text + JOINER
        case "definition" if text[1] == "^" or match.string.find(text) == match.string.rfind(text):
            return text + JOINER
        case "link" if match.end() < len(match.string) and match.string[match.end()] > "\x7f":
            return text + SPACE
        case "product" | "tildes":
            return text + SPACE
        case "strike":
            return f"~~{_PROSE.sub(_shown, text[2:-2])}~~"
        case "emphasis":
            stars = match["stars"]
            inner = text[len(stars) : -len(stars)]
            before = "" if inner[0].isalnum() or inner[0] in _RIGHT else JOINER
            after = "" if inner[-1].isalnum() or inner[-1] in _LEFT else JOINER
            return stars + before + _PROSE.sub(_shown, inner) + after + stars
    return text
