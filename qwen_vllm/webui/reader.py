"""Reads the text of one document: python reader.py FILE. It knows nothing of the page.

The page runs it as a process of its own: a file that takes too long, or too much memory, ends that process alone.
It prints the text, or with exit status UNREADABLE why there is none: a key of `qwen_vllm/words.json`.
"""

import re
import resource
import sys
import unicodedata
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from charset_normalizer import from_bytes

UNREADABLE = 3
"""The exit status where there is no text."""
MAX_BYTES = 20_000_000
MAX_UNPACKED = 100_000_000
"""Bytes of a DOCX file's parts."""
MAX_PAGES = 1000
MAX_CHARACTERS = 1_000_000
MAX_MEMORY = 1 << 30
"""Bytes of address space of the process."""
MAX_SECONDS = 20
LIMITS = {
    "megabytes": MAX_BYTES // 1_000_000,
    "unpacked": MAX_UNPACKED // 1_000_000,
    "pages": MAX_PAGES,
    "characters": MAX_CHARACTERS,
    "seconds": MAX_SECONDS,
}
"""What the words name."""

_BOMS = {b"\xef\xbb\xbf": "utf-8", b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16"}
_BOMS |= {b"\xfe\xff": "utf-16"}
_OTHER_ENCODINGS = ["big5", "cp1252", "shift_jis", "euc_kr", "cp1251"]
_W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_SIGNS = {f"{_W}tab": "\t", f"{_W}br": "\n", f"{_W}cr": "\n"}
_IMAGES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF87a", b"GIF89a")
_RADICALS = re.compile("[\u2e80-\u2fdf]")
"""Many a PDF has these for the characters that look like them: a font draws both alike."""
_NO_TEXT = re.compile(r"[\0-\x08\x0b-\x1f\x7f\ufffe\uffff\ud800-\udfff]")


class Unreadable(Exception):
    """Says by a key of `qwen_vllm/words.json` why a document has no text."""


def read(file: Path) -> str:
    """Return the text of a document, which is found by its content, not by its name.

    Raises:
        Unreadable: it is over a limit, broken, encrypted, empty, or of a kind that is not read.
    """
    if file.stat().st_size > MAX_BYTES:
        raise Unreadable("document_large")
    data = file.read_bytes()
    if data[:1024].lstrip().startswith(b"%PDF-"):
        text = _pdf(data)
    elif data.startswith(b"PK\3\4"):
        text = _docx(file)
    elif data.startswith(b"\xd0\xcf\x11\xe0"):  # Office's format until 2007, and that of its files with a password
        raise Unreadable("document_old")
    elif data.startswith(_IMAGES) or data[8:12] == b"WEBP":
        raise Unreadable("image_refused")
    else:
        text = _plain(data)
    text = _RADICALS.sub(lambda found: unicodedata.normalize("NFKC", found[0]), text)
    text = _NO_TEXT.sub("", text.replace("\r\n", "\n").replace("\r", "\n")).strip("\n")
    if len(text) > MAX_CHARACTERS:
        raise Unreadable("document_long")
    if not text.strip():
        raise Unreadable("document_empty")
    return text


def _pdf(data: bytes) -> str:
    import pypdfium2  # the page imports this module, and needs no PDF library

    try:
        pdf = pypdfium2.PdfDocument(data)
        if len(pdf) > MAX_PAGES:
            raise Unreadable("document_pages")
        text = "\n\n".join(page.get_textpage().get_text_range() for page in pdf)
    except pypdfium2.PdfiumError as error:
        encrypted = error.err_code == pypdfium2.raw.FPDF_ERR_PASSWORD
        raise Unreadable("document_encrypted" if encrypted else "document_broken") from error
    if not text.strip():
        raise Unreadable("document_scanned")
    return text


def _docx(file: Path) -> str:
    import docx

    try:
        with zipfile.ZipFile(file) as parts:
            if "word/document.xml" not in parts.namelist():
                raise Unreadable("document_unknown")
            if sum(part.file_size for part in parts.infolist()) > MAX_UNPACKED:
                raise Unreadable("document_unpacked")
        return "\n".join(_blocks(docx.Document(str(file)).element.body))
    except Unreadable:
        raise
    except Exception as error:  # the libraries for ZIP, XML and DOCX have many
        raise Unreadable("document_broken") from error


def _blocks(element: Any) -> Iterator[str]:
    """Yield the paragraphs, and the rows of the tables as Markdown has them, in order; without deleted text."""
    for child in element:
        if child.tag == f"{_W}p":
            yield _line(child)
        elif child.tag == f"{_W}tbl":
            for row in child.iterchildren(f"{_W}tr"):
                cells = [" ".join(map(_line, cell.iter(f"{_W}p"))) for cell in row.iterchildren(f"{_W}tc")]
                yield f"| {' | '.join(cells)} |"
        else:  # a content control, an insertion
            yield from _blocks(child)


def _line(paragraph: Any) -> str:
    pieces = paragraph.xpath(".//w:r/*[not(ancestor::*[local-name()='Fallback'])]")
    return "".join(piece.text or "" if piece.tag == f"{_W}t" else _SIGNS.get(piece.tag, "") for piece in pieces)


def _plain(data: bytes) -> str:
    for bom, encoding in _BOMS.items():
        if data.startswith(bom):
            return data.decode(encoding, "replace").removeprefix("\ufeff")
    if b"\0" in data:
        raise Unreadable("document_unknown")
    for encoding in ("utf-8", "gb18030"):
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if encoding == "utf-8" or _is_chinese(text):
            return text
    if not (best := from_bytes(data, cp_isolation=_OTHER_ENCODINGS).best()):
        raise Unreadable("document_unknown")
    return str(best)


def _is_chinese(text: str) -> bool:
    """Tell whether nearly all letters beyond ASCII are common: bytes of another encoding give rare characters."""
    letters = "".join(letter for letter in text if letter > "\x7f")
    return len(letters.encode("gb2312", "ignore")) >= 2 * 0.9 * len(letters)


def main() -> int:
    """Print the text of the file that is named; return the exit status."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(
        resource.RLIMIT_CPU, (2 * MAX_SECONDS, 2 * MAX_SECONDS)
    )  # the page may be gone before it ends this
    try:
        text, status = read(Path(sys.argv[1])), 0
    except Unreadable as why:
        text, status = str(why), UNREADABLE
    sys.stdout.buffer.write(text.encode())
    return status


if __name__ == "__main__":
    raise SystemExit(main())
