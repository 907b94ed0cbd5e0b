"""The door that adds a bearer token: who may pass, what passes, and where the token goes."""

from __future__ import annotations

import base64
import contextlib
import http.client
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from vmrt.errors import ImageError
from vmrt.images import bearer
from vmrt.images.bearer import Door

TOKEN = "se.cret"


class Registry(http.server.BaseHTTPRequestHandler):
    """An upstream: a blob, a redirect, an answer without a length, and a challenge for wrong tokens."""

    protocol_version = "HTTP/1.1"
    seen: ClassVar[list[tuple[str, str, str]]] = []

    def do_GET(self) -> None:
        token = self.headers.get("Authorization", "")
        self.seen.append((self.command, self.path, token))
        if token != f"Bearer {TOKEN}":
            self.answer(401, b"who are you", WWW_Authenticate='Bearer realm="http://127.0.0.1:1/token"')
        elif self.path == "/v2/blob":
            self.answer(200, b"x" * 200_000, Docker_Content_Digest="sha256:1", Set_Cookie="no")
        elif self.path == "/v2/elsewhere":
            self.answer(307, b"", Location="http://127.0.0.1:1/storage")
        elif self.path == "/v2/endless":
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(b"until the end")
            self.close_connection = True
        else:
            self.answer(404, b'{"errors": []}')

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def registry() -> Iterator[str]:
    Registry.seen.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Registry) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def ask(
    door: Door, path: str, method: str = "GET", password: str | None = None
) -> tuple[int, http.client.HTTPMessage, bytes]:
    account = base64.b64encode(f"vmrt:{door.password if password is None else password}".encode()).decode()
    with contextlib.closing(http.client.HTTPConnection(door.address, timeout=60)) as connection:
        connection.request(method, path, headers={"Authorization": f"Basic {account}"} if account else {})
        with connection.getresponse() as answer:
            return answer.status, answer.headers, answer.read()


async def test_what_passes_a_door(registry: str) -> None:
    async with bearer.opened(registry, TOKEN, plain=True) as door:
        status, headers, body = ask(door, "/v2/blob")
        assert (status, len(body), headers["Docker-Content-Digest"]) == (200, 200_000, "sha256:1")
        assert "Set-Cookie" not in headers
        status, headers, body = ask(door, "/v2/blob", "HEAD")
        assert (status, headers["Content-Length"], body) == (200, "200000", b"")
        status, headers, _ = ask(door, "/v2/elsewhere")
        assert (status, headers["Location"]) == (307, "http://127.0.0.1:1/storage")
        assert ask(door, "/v2/endless")[2] == b"until the end"
        assert ask(door, "/v2/absent")[0] == 404
    assert {token for _, _, token in Registry.seen} == {f"Bearer {TOKEN}"}


async def test_who_and_what_does_not_pass(registry: str) -> None:
    async with bearer.opened(registry, TOKEN, plain=True) as door:
        status, headers, _ = ask(door, "/v2/blob", password="guessed")
        assert (status, headers["WWW-Authenticate"]) == (401, 'Basic realm="vmrt"')
        assert ask(door, "/debug")[0] == 404
        assert ask(door, "/v2/blob", "DELETE")[0] == 501
    assert Registry.seen == []
    assert door.password not in repr(door)


async def test_the_registrys_challenge_does_not_reach_skopeo(registry: str) -> None:
    async with bearer.opened(registry, "wrong", plain=True) as door:
        status, headers, body = ask(door, "/v2/blob")
    assert (status, headers["WWW-Authenticate"]) == (403, None)
    assert b"the registry refuses the token" in body


async def test_a_registry_that_is_not_there_or_has_no_tls(registry: str) -> None:
    async with bearer.opened("127.0.0.1:1", TOKEN, plain=True) as door:
        assert ask(door, "/v2/")[0] == 503
    async with bearer.opened(registry, TOKEN) as door:
        assert ask(door, "/v2/blob")[0] == 503
    # Without TLS the token is given to nobody unless the registry is called insecure.
    assert Registry.seen == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("r.example/x", True),
        ("r.example/safe/x", False),
        ("r.example/safer/x", True),
        ("r.example.org/x", False),
        ("other.example/x", False),
        ("l.example/x", True),
    ],
)
def test_which_registry_is_insecure(tmp_path: Path, name: str, expected: bool) -> None:
    conf = tmp_path / "registries.conf"
    conf.write_text(
        '[[registry]]\nprefix = "r.example"\nlocation = "m"\ninsecure = true\n'
        '[[registry]]\nprefix = "r.example/safe"\n[[registry]]\nlocation = "l.example"\ninsecure = true\n'
    )
    assert bearer.insecure(str(conf), name) is expected


def test_a_registries_conf_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="does not exist"):
        bearer.insecure(str(tmp_path / "absent"), "r.example/x")
    (tmp_path / "bad").write_text("[[[")
    with pytest.raises(ImageError, match="cannot read"):
        bearer.insecure(str(tmp_path / "bad"), "r.example/x")
