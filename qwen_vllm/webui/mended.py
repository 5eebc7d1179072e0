"""Serves some of Gradio's scripts and styles mended: Gradio does much anew for each piece of an answer.

What the repairs call is in mended.js. Formulas are drawn by formulas.js, in the place of a whole script.
"""

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from fastapi import FastAPI, Response

from qwen_vllm.webui import gradio

REPAIRS = {
    "Blocks-*.js": {
        # Each step of an event set the state of all components, and drew them.
        "Object.entries(this.loading_stati.current)": "mended.changed(this.loading_stati.current)",
    },
    "markdown-code-*.js": {
        # A text that is drawn already was read again, and drawn anew as its turn went from one chatbot to the other.
        "async function re(e,t){": "let drawn;async function re(e,t){v||await 0;const from=mended.moved(t+e,v);"
        "if(from)[D,O,drawn]=[from.blocks,from.context,from.text];if(drawn===t+e&&k())return!0;",
        "return D=[...D.slice(0,a),...l,...d],O=n,": "return D=[...D.slice(0,a),...l,...d],O=n,"
        "mended.stands(v,{text:drawn=t+e,blocks:D,context:n}),",
        # All that was found so far was copied at each token.
        "walkTokens(e,t){let n=[];": "walkTokens(e,t){return mended.walkTokens(this,e,t)}walkAll(e,t){let n=[];",
        # Tags that stay open were looked for where there are none.
        "Ct(y,e,u,_()||!1)": "e.raw.includes(`<`)&&Ct(y,e,u,_()||!1)",
        # Formulas, which are set aside before, were looked for in all the rest of the text at each block.
        "extensions:[i,a]": "extensions:[i]",
        # Code was coloured as a whole, each time.
        "Qe.highlight(e,Qe.languages[t],t)": "mended.coloured(Qe,e,t)",
        # A block that grew was drawn anew as a whole.
        "if(i){for(let e of D.slice(a,D.length-o))": "if(i){for(let e of mended.grow(D.slice(a,D.length-o),l))",
    },
    # All cells of an answer were styled anew for each that came: the tables of `gr.Dataframe` would look otherwise.
    "Index-*.css": {".bot:not(:has(.table-wrap)) ": ".bot "},
}
"""What is written in another way, in the one file whose name fits."""


def mend(app: FastAPI) -> None:
    """Serve the mended files under their names. Call it before Gradio is mounted.

    Raises:
        RuntimeError: this is not the Gradio that the repairs are for.
    """
    formulas = files("qwen_vllm.webui").joinpath("formulas.js").read_text("utf-8")
    (drawing, _), (katex, _) = _find("auto-render-*.js"), _find("katex-*.js")
    _serve(app, drawing, formulas.replace("KATEX", f"./{katex.name}"))
    for name, repairs in REPAIRS.items():
        file, text = _find(name, *repairs)
        for before, after in repairs.items():
            text = text.replace(before, after)
        _serve(app, file, text)


def assets(name: str) -> Iterator[Path]:
    """Yield Gradio's scripts and styles whose names fit."""
    return (Path(gradio.__file__).parent / "templates/frontend/assets").glob(name)


def _find(name: str, *parts: str) -> tuple[Path, str]:
    """Return the one asset whose name fits, and which has these parts, with its text."""
    texts = ((file, file.read_text("utf-8")) for file in assets(name))
    found = [(file, text) for file, text in texts if all(part in text for part in parts)]
    if len(found) != 1:
        raise RuntimeError(f"Gradio {gradio.__version__} is not the one this page is made for: run `make setup`")
    return found[0]


def _serve(app: FastAPI, file: Path, text: str) -> None:
    kind = {".js": "text/javascript", ".css": "text/css"}[file.suffix]

    @app.get(f"/assets/{file.name}")
    def _mended() -> Response:
        return Response(text, media_type=kind, headers={"cache-control": "no-cache"})
