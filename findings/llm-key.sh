#!/bin/sh
# llm 0.36: --key is dropped in silence for a model of extra-openai-models.yaml.
#
# Input: a model in that file with model_id, model_name and api_base, as the docs show for a local server; no
# api_key_name. Then `llm -m MODEL --key KEY "?"`.
#
# Behaviour: the key that was given is never sent. The request has a placeholder in its place, "Bearer DUMMY_KEY", so a
# server with a key answers 401, and the user looks for the fault in the key. Nothing says that --key was not used, and
# OPENAI_API_KEY is not used either. With `api_key_name: anything` in the file, --key is sent.
#
# Seen on 2026-11-28, Python 3.11:
#   without api_key_name  Bearer DUMMY_KEY
#   with api_key_name     Bearer KEY
#
# Exits with 0 while that is so, with 1 if it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check llm==0.36
cd "$folder"
venv/bin/python - <<'PYTHON'
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

sent = []


class Server(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        sent.append(self.headers["Authorization"])
        self.rfile.read(int(self.headers["Content-Length"]))
        message = {"role": "assistant", "content": "Hello"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        answer = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
        answer["usage"] = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


server = HTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
model = {"model_id": "local", "model_name": "m", "api_base": f"http://127.0.0.1:{server.server_port}/v1"}
environment = {**os.environ, "LLM_USER_PATH": str(Path.cwd()), "NO_PROXY": "127.0.0.1", "OPENAI_API_KEY": "OTHER"}
for name, further in (("without api_key_name", {}), ("with api_key_name", {"api_key_name": "anything"})):
    Path("extra-openai-models.yaml").write_text(json.dumps([{**model, **further}]))
    command = ["venv/bin/llm", "-m", "local", "--no-stream", "--key", "KEY", "?"]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    print(f"{name:21} {sent[-1]}")
sys.exit(sent != ["Bearer DUMMY_KEY", "Bearer KEY"])
PYTHON
