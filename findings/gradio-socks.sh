#!/bin/sh
# gradio 6.31.0, httpx 0.28: `import gradio` fails where the desktop's proxy is a SOCKS one.
#
# Input: an environment with ALL_PROXY=socks://127.0.0.1:1080/, as GNOME and Clash set it, or socks5:// without the
# package socksio. Nothing is to be sent through the proxy: the program serves a page on this machine.
#
# Behaviour: gradio/processing_utils.py makes an httpx client when it is imported. The client reads the proxies of the
# environment and raises, a ValueError for socks:// and an ImportError for socks5://. So no program that imports gradio
# starts, whatever it would have done. Without the variable during the import it works.
#
# Seen on 2026-11-28, Python 3.11:
#   socks://127.0.0.1:1080/   ValueError
#   socks5://127.0.0.1:1080/  ImportError
#
# Exits with 0 while that is so, with 1 if it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check gradio==6.31.0
for scheme in socks socks5; do
    ALL_PROXY="$scheme://127.0.0.1:1080/" "$folder/venv/bin/python" - "$scheme" <<'PYTHON'
import sys

expected = {"socks": ValueError, "socks5": ImportError}[sys.argv[1]]
try:
    import gradio  # noqa: F401
except Exception as error:
    print(f"{sys.argv[1]}://127.0.0.1:1080/  {type(error).__name__}")
    sys.exit(type(error) is not expected)
sys.exit(1)
PYTHON
done
