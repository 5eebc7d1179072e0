"""Serves the page's own drawing of formulas (formulas.js) in the place of the module that Gradio draws them with."""

from importlib.resources import files

from fastapi import FastAPI, Response

from qwen_vllm.webui import gradio


def replace_renderer(app: FastAPI) -> None:
    """Serve formulas.js under the name of Gradio's module. Call it before Gradio is mounted."""
    assets = files(gradio).joinpath("templates/frontend/assets")
    names = [asset.name for asset in assets.iterdir() if asset.name.endswith(".js")]
    renderer, katex = (next(name for name in names if name.startswith(kind)) for kind in ("auto-render-", "katex-"))
    script = files("qwen_vllm.webui").joinpath("formulas.js").read_text("utf-8").replace("KATEX", f"./{katex}")

    @app.get(f"/assets/{renderer}")
    def _formulas() -> Response:
        return Response(script, media_type="text/javascript", headers={"cache-control": "no-cache"})
