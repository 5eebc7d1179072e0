"""Small files for tests of documents."""


def pdf(*pages: str, encrypted: bool = False) -> bytes:
    """A PDF with a line of text for each line. Its font is not embedded; a table says what its codes mean."""
    codes = sorted({ord(letter) for page in pages for letter in page} - {10})
    table = "\n".join(f"<{code:04x}> <{code:04x}>" for code in codes)
    meaning = (
        "/CIDInit /ProcSet findresource begin begincmap /CMapType 2 def\n1 begincodespacerange <0000> <ffff> "
        f"endcodespacerange\n{len(codes)} beginbfchar\n{table}\nendbfchar endcmap end"
    )
    kids = " ".join(f"{7 + 2 * n} 0 R" for n in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type0 /BaseFont /F /Encoding /Identity-H "
        "/DescendantFonts [4 0 R] /ToUnicode 5 0 R >>",
        "<< /Type /Font /Subtype /CIDFontType2 /BaseFont /F /CIDSystemInfo << /Registry (Adobe) /Ordering (Identity) "
        "/Supplement 0 >> /FontDescriptor 6 0 R >>",
        _stream(meaning),
        "<< /Type /FontDescriptor /FontName /F /Flags 4 /FontBBox [0 0 1000 1000] /ItalicAngle 0 /Ascent 800 "
        "/Descent -200 /CapHeight 700 /StemV 80 >>",
    ]
    for page in pages:
        lines = [
            f"BT /F 12 Tf 50 {700 - 20 * n} Td <{line.encode('utf-16-be').hex()}> Tj ET"
            for n, line in enumerate(page.splitlines())
        ]
        resources = f"/Resources << /Font << /F 3 0 R >> >> /Contents {len(objects) + 2} 0 R"
        objects += [f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] {resources} >>", _stream("\n".join(lines))]
    body, places = b"%PDF-1.4\n", []
    for n, content in enumerate(objects, 1):
        places.append(len(body))
        body += f"{n} 0 obj\n{content}\nendobj\n".encode()
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    key = f"<{'00' * 32}>"
    lock = f"/Encrypt << /Filter /Standard /V 1 /R 2 /O {key} /U {key} /P -4 >> /ID [<00> <00>]" if encrypted else ""
    end = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer\n"
    end += f"<< /Size {len(objects) + 1} /Root 1 0 R {lock} >>\nstartxref\n{len(body)}\n%%EOF\n"
    return body + end.encode()


def _stream(text: str) -> str:
    return f"<< /Length {len(text)} >>\nstream\n{text}\nendstream"
