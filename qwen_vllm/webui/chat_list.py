"""The panel of the chats that the browser keeps. What its fields and buttons do is in `page.js`."""

from collections.abc import Callable, Sequence
from typing import Any

from qwen_vllm.webui import UNQUEUED
from qwen_vllm.webui import gradio as gr


class ChatList:
    """The panel's components. Made inside `gr.Blocks`, which adds them."""

    def __init__(self, say: Callable[[str], Any]) -> None:
        with gr.Sidebar(elem_id="chats", open=False):
            self.new = gr.Button(say("new"), variant="primary", elem_id="new")
            self.search = gr.Textbox(
                label=say("search"), show_label=False, placeholder=say("search"), max_lines=1, elem_id="search"
            )
            self.earlier = gr.Radio([], label=say("earlier"), elem_id="earlier")
            with gr.Row():
                self.rename = gr.Button(say("rename"), size="sm", min_width=0, elem_id="rename")
                self.pin = gr.Button(say("pin"), size="sm", min_width=0, elem_id="pin")
                self.delete = gr.Button(say("delete"), size="sm", min_width=0, elem_id="delete")
            with gr.Row():
                self.to_markdown = gr.Button(say("as_markdown"), size="sm", min_width=0, elem_id="to-markdown")
                self.to_json = gr.Button(say("as_json"), size="sm", min_width=0, elem_id="to-json")
            with gr.Accordion(say("all_chats"), open=False, elem_id="all-chats") as self.all:
                with gr.Row():
                    self.export = gr.Button(say("export_all"), size="sm", min_width=0, elem_id="export-all")
                    self.take_in = gr.Button(say("import_all"), size="sm", min_width=0, elem_id="import-all")
                self.several = gr.CheckboxGroup([], label=say("several"), show_select_all=True, elem_id="several")
                self.delete_several = gr.Button(say("delete_several"), size="sm", elem_id="delete-several")
        self.refresh = gr.Button(visible="hidden", elem_id="refresh")

    def connect(self, shown: Sequence[gr.components.Component], stop: Callable[..., Any]) -> None:
        """Say what happens on each event. `shown` is what a chat that is opened changes; `stop` stops the answer."""
        self.new.click(stop, **UNQUEUED).then(js="chats.fresh", outputs=shown)
        self.earlier.input(stop, **UNQUEUED).then(js="chats.open", inputs=self.earlier, outputs=shown)
        self.delete.click(stop, **UNQUEUED).then(js="chats.remove", outputs=shown)
        searched = self.search.change(js="chats.search", inputs=self.search, outputs=self.earlier)
        searched.then(js="chats.choices", outputs=self.several)
        self.rename.click(js="chats.rename", outputs=self.earlier)
        self.pin.click(js="chats.pin", outputs=self.earlier)
        self.all.expand(js="chats.choices", outputs=self.several)
        self.export.click(js="transfer.save")
        self.take_in.click(js="transfer.load", outputs=self.earlier)
        self.delete_several.click(js="chats.removeSeveral", inputs=self.several, outputs=[*shown, self.several])
        self.refresh.click(js="chats.refresh", outputs=shown)
