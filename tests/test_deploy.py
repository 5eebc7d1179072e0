"""The page and the server behind the proxies of deploy/, from Debian's packages: path, https, login, pieces at once."""

import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests
from requests.adapters import HTTPAdapter
from urllib3 import Retry

from tests.support import ROOT
from tests.support.page_server import ask, serving
from tests.support.scripted_server import LAST, Server, line

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore:Unverified HTTPS request")]
CERTIFICATE = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=chat.example -keyout key.pem -out certificate.pem"
PROXIES = {
    "nginx": (
        "nginx -p . -c nginx.conf",
        "listen 8080 ssl; ssl_certificate certificate.pem; ssl_certificate_key key.pem",
    ),
    "haproxy": ("haproxy -f haproxy.cfg", "bind :8080 ssl crt both.pem"),
}
"""For each its command, and how it listens for https."""
NAME = {"Host": "chat.example:8443"}


@contextmanager
def proxy_before(server: Server, page: str, proxy: str, tls: bool, folder: Path) -> Iterator[str]:
    """A proxy with its configuration of deploy/, but other ports; yields its address."""
    command, https = PROXIES[proxy]
    name = command.split()[-1]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    conf = (ROOT / "deploy" / name).read_text().replace("    server b 127.0.0.1:8002\n", "")
    conf = re.sub(r"(listen |bind :)8080", https, conf) if tls else conf
    conf = re.sub(r"127\.0\.0\.1:800[01]", urlsplit(server.url).netloc, conf)
    conf = conf.replace("127.0.0.1:7860", urlsplit(page).netloc)
    folders = "".join(f"{kind}_temp_path {kind}; " for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    conf = conf.replace("8080", str(port)).replace("http {", f"http {{ {folders}")
    (folder / name).write_text(conf)
    subprocess.run(CERTIFICATE.split(), cwd=folder, check=True, capture_output=True)
    (folder / "both.pem").write_text("".join((folder / name).read_text() for name in ("certificate.pem", "key.pem")))
    with subprocess.Popen(command.split(), cwd=folder) as running:
        try:
            yield f"http{'s' * tls}://127.0.0.1:{port}"
        finally:
            running.terminate()


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
@pytest.mark.parametrize("proxy", PROXIES)
def test_the_page_is_used_under_a_path_and_another_name(server: Server, tmp_path: Path, proxy: str, tls: bool) -> None:
    if not shutil.which(proxy):
        pytest.skip(f"there is no {proxy}: apt install {proxy}")
    seen = threading.Event()
    server.play(b"", path="/ready")
    server.play(line({"models": ["Qwen"]}), path="/chat/info")
    server.play(line({"delta": "Hel"}), seen, line({"delta": "lo"}), line(LAST))
    with (
        serving("--server-url", server.url, "--root-path", "/qwen", "--auth", "ada:secret") as page,
        proxy_before(server, page, proxy, tls, tmp_path) as url,
        requests.Session() as web,
    ):
        web.trust_env = web.verify = False
        web.headers.update(NAME)
        web.mount(url, HTTPAdapter(max_retries=Retry(9, status_forcelist=[503], backoff_factor=0.1)))
        home = f"{urlsplit(url).scheme}://{NAME['Host']}/qwen"
        assert web.get(f"{url}/chat/info").json() == {"models": ["Qwen"]}
        assert web.get(f"{url}/metrics").status_code == 404
        assert web.get(f"{url}/qwen", allow_redirects=False).headers["Location"] == "/qwen/"
        assert web.get(f"{url}/qwen/config").status_code == 401
        login = web.post(f"{url}/qwen/login", data={"username": "ada", "password": "secret"})
        web.headers["Cookie"] = "; ".join(f"{cookie.name}={cookie.value}" for cookie in login.cookies)
        assert web.get(f"{url}/qwen/config").json()["root"] == home
        ask(f"{url}/qwen", "ada", web=web)
        with web.get(f"{url}/qwen/gradio_api/queue/data?session_hash=ada", stream=True, timeout=30) as stream:
            lines = stream.iter_lines(1)
            assert any("Hel" in each.decode() for each in lines)  # before the rest is sent
            seen.set()
            assert any("Hello" in each.decode() for each in lines)
