"""A registry for skopeo on loopback that passes requests on with a bearer token: AuthConfig's `registry_token`.

skopeo takes such a token on its command line only, where every user of the machine could read it. So for a pull with a
token it is given another place for the registry (registries.conf(5), `location`): this door, which adds the token. The
name, and with it the signature policy's, stays the registry's own.

- The door opens to who has a password that is made for the pull and lies in the pull's private auth file: the port is
  everybody's.
- It only reads: GET and HEAD below /v2/. Redirects (to where a registry keeps its blobs) go to skopeo, which follows
  them without the token.
- The token goes to the registry that the reference names and nowhere else: mirrors are not asked. TLS is verified with
  the system's certificates and those of certs.d(5); a registry that registries.conf calls insecure may do without.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import http.client
import http.server
import logging
import secrets
import socketserver
import ssl
import threading
import tomllib
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmrt.errors import ImageError
from vmrt.images.reference import Reference
from vmrt.model import RegistryAuth

log = logging.getLogger(__name__)

TIMEOUT_S = 60.0
DEFAULT_REGISTRIES_CONF = Path("/etc/containers/registries.conf")
_CERTIFICATES = (Path("/etc/containers/certs.d"), Path("/etc/docker/certs.d"))
_CHUNK = 65536
_TO_REGISTRY = ("Accept", "Range")
_TO_SKOPEO = ("Content-Type", "Content-Length", "Content-Range", "Docker-Content-Digest", "Location", "ETag")
USER = "vmrt"


@dataclass(frozen=True, slots=True)
class Door:
    """An open door: what skopeo needs to go through it. The repr hides the password."""

    address: str
    password: str = field(repr=False)

    def registries_conf(self, reference: Reference) -> str:
        """Return a registries.conf that puts this door in the registry's place, for one repository."""
        # The longest prefix wins, also over files of registries.conf.d.
        return (
            f'[[registry]]\nprefix = "{reference.name}"\n'
            f'location = "{self.address}/{reference.repository}"\ninsecure = true\n'
        )

    def auth(self) -> RegistryAuth:
        """Return the credentials that open the door."""
        return RegistryAuth(username=USER, password=self.password)


def insecure(registries_conf: str, name: str) -> bool:
    """Say whether a registries.conf calls a registry/repository insecure; the entry with the longest prefix counts.

    Raises `ImageError` for a file that cannot be read.
    """
    path = Path(registries_conf) if registries_conf else DEFAULT_REGISTRIES_CONF
    try:
        document = tomllib.loads(path.read_text())
    except FileNotFoundError:
        if registries_conf:
            raise ImageError(f"cannot read {path}: it does not exist", hint="see images.registries_conf") from None
        return False
    except (OSError, ValueError) as e:
        raise ImageError(f"cannot read {path}: {e}", hint="see images.registries_conf") from e
    best, found = -1, False
    for entry in document.get("registry", []):
        prefix = str(entry.get("prefix") or entry.get("location") or "")
        if len(prefix) > best and f"{name}/".startswith(f"{prefix}/"):
            best, found = len(prefix), bool(entry.get("insecure", False))
    return found


@contextlib.asynccontextmanager
async def opened(registry: str, token: str, *, plain: bool = False) -> AsyncIterator[Door]:
    """Serve a door to `registry` until the block ends; `plain` is for an insecure one. It serves in threads."""
    password = secrets.token_urlsafe(24)
    handler = type("Handler", (_Handler,), {"upstream": _Upstream(registry, token, plain=plain), "password": password})
    with _Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield Door(f"127.0.0.1:{server.server_address[1]}", password)
        finally:
            # Waits for the serving thread to notice; not cancellable, because the port is closed next.
            await asyncio.shield(asyncio.to_thread(server.shutdown))


class _Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    # A transfer that hangs must not keep the pull's end waiting; its thread ends with the connection.
    daemon_threads = True
    block_on_close = False

    def server_bind(self) -> None:
        # HTTPServer would look up the address's name.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("registry door: a connection broke", exc_info=True)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Let skopeo follow: the token is not for other hosts."""


class _Upstream:
    """The registry; proxies of the environment are used as skopeo would use them."""

    def __init__(self, registry: str, token: str, *, plain: bool) -> None:
        self._host = "registry-1.docker.io" if registry == "docker.io" else registry
        self._token = token
        self._plain = plain
        context = ssl.create_default_context()
        # On by default since Python 3.13; skopeo takes CAs without a key identifier, and this speaks in its place.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        for directory in _CERTIFICATES:
            for certificate in sorted((directory / registry).glob("*.crt")):
                with contextlib.suppress(OSError, ssl.SSLError):
                    context.load_verify_locations(certificate)
        if plain:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        self._opener = urllib.request.build_opener(_NoRedirect(), urllib.request.HTTPSHandler(context=context))

    def open(self, method: str, path: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        """Ask the registry; answers of any status are returned. Raises `OSError`."""
        for scheme in ("https", "http") if self._plain else ("https",):
            request = urllib.request.Request(f"{scheme}://{self._host}{path}", method=method, headers=headers)
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
            try:
                return self._opener.open(request, timeout=TIMEOUT_S)  # type: ignore[no-any-return]
            except urllib.error.HTTPError as e:
                return e  # type: ignore[return-value]
            except urllib.error.URLError:
                # An insecure registry may speak TLS or not; nobody else is asked without.
                if scheme == "http" or not self._plain:
                    raise
        raise AssertionError("no scheme")


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = TIMEOUT_S
    upstream: _Upstream
    password: str

    def do_GET(self) -> None:
        """Pass a request on."""
        if not self._admitted():
            self._refuse(401, "UNAUTHORIZED", "this door is not yours")
            return
        if not self.path.startswith("/v2/"):
            self._refuse(404, "UNSUPPORTED", "no such path")
            return
        # Several lines of one name are one list (RFC 9110, 5.3); Go sends Accept so.
        headers = {name: ", ".join(values) for name in _TO_REGISTRY if (values := self.headers.get_all(name))}
        try:
            answer = self.upstream.open(self.command, self.path, headers)
        except OSError as e:
            self._refuse(503, "UNAVAILABLE", str(getattr(e, "reason", e)))
            return
        with answer:
            if answer.status == 401:
                # Its challenge must not reach skopeo, which would take our password to the realm that it names.
                self._refuse(403, "DENIED", "access to the resource is denied: the registry refuses the token")
                return
            self._pass(answer)

    do_HEAD = do_GET

    def _pass(self, answer: http.client.HTTPResponse) -> None:
        self.send_response(answer.status)
        for name in _TO_SKOPEO:
            if value := answer.headers.get(name):
                self.send_header(name, value)
        if "Content-Length" not in answer.headers:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if self.command == "HEAD":
            return
        left = int(answer.headers.get("Content-Length", 2**63))
        while left > 0 and (data := answer.read(min(_CHUNK, left))):
            self.wfile.write(data)
            left -= len(data)
        if "Content-Length" in answer.headers and left:
            # Cut off: skopeo must not take the next answer for the rest of this one.
            self.close_connection = True

    def _admitted(self) -> bool:
        wanted = base64.b64encode(f"{USER}:{self.password}".encode()).decode()
        return hmac.compare_digest(self.headers.get("Authorization", "").encode(), f"Basic {wanted}".encode())

    def _refuse(self, status: int, code: str, message: str) -> None:
        body = f'{{"errors": [{{"code": "{code}", "message": "{_plain(message)}"}}]}}'.encode()
        self.send_response(status)
        if status == 401:
            self.send_header("WWW-Authenticate", 'Basic realm="vmrt"')
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say it at level debug; the path is no secret."""
        log.debug("registry door: " + format, *args)


def _plain(text: str) -> str:
    return "".join(c for c in text if c.isprintable() and c not in '"\\')[:500]
