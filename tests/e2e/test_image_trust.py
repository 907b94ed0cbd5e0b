"""Tokens and signatures: a real registry that wants bearer tokens, and images that a real GnuPG has signed."""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import logging
import os
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_images_layer import Member, tar_of
from test_images_store import A, B, sha

from tests.e2e.docker_registry import Registry
from tests.e2e.test_image_registry import opened, settings, skopeos
from vmrt.errors import ImageError, SignatureError
from vmrt.model import RegistryAuth

IDENTITY = "identity-token-of-somebody"


def b64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class Issuer:
    """Who issues the tokens of a registry (distribution's token authentication), and exchanges identity tokens."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.exchanged: list[dict[str, list[str]]] = []
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key", "-out", "cert",
             "-subj", "/CN=issuer", "-days", "2"],
            cwd=directory, check=True, capture_output=True,
        )  # fmt: skip
        issuer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = b""
                # skopeo sends it in chunks (RFC 9112, 7.1).
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                form = urllib.parse.parse_qs(body.decode())
                issuer.exchanged.append(form)
                known = form.get("refresh_token") == [IDENTITY]
                answer = json.dumps({"access_token": issuer.token("app", "pull"), "expires_in": 300} if known else {})
                self.send_response(200 if known else 401)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer.encode())

            def do_GET(self) -> None:
                self.send_error(401)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def settings(self) -> dict[str, object]:
        realm = f"http://127.0.0.1:{self.server.server_address[1]}/token"
        bundle = str(self.directory / "cert")
        return {"token": {"realm": realm, "service": "registry", "issuer": "issuer", "rootcertbundle": bundle}}

    def token(self, repository: str, *actions: str) -> str:
        lines = (self.directory / "cert").read_text().strip().splitlines()
        header = {"typ": "JWT", "alg": "RS256", "x5c": ["".join(lines[1:-1])]}
        now = int(time.time())
        claims = {
            "iss": "issuer", "sub": "s", "aud": "registry", "jti": "1",
            "exp": now + 600, "nbf": now - 60, "iat": now,
            "access": [{"type": "repository", "name": repository, "actions": list(actions)}],
        }  # fmt: skip
        signed = ".".join(b64url(json.dumps(part).encode()) for part in (header, claims))
        signature = subprocess.run(
            ["openssl", "dgst", "-sha256", "-sign", "key"],
            cwd=self.directory, input=signed.encode(), capture_output=True, check=True,
        )  # fmt: skip
        return f"{signed}.{b64url(signature.stdout)}"


@pytest.fixture(scope="module")
def issuer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Issuer]:
    issuer = Issuer(tmp_path_factory.mktemp("issuer"))
    yield issuer
    issuer.server.shutdown()
    issuer.server.server_close()


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, issuer: Issuer) -> Iterator[Registry]:
    """A registry that takes nothing but bearer tokens."""
    registry = Registry(tmp_path_factory.mktemp("registry"), auth=issuer.settings)
    registry.headers["Authorization"] = f"Bearer {issuer.token('app', 'pull', 'push')}"
    registry.push("app", "1", [A, B])
    # Large enough for its fetcher to be looked at.
    registry.push("app", "large", [A, tar_of(Member("large", os.urandom(30 << 20)))])
    yield registry
    registry.stop()


async def test_a_registry_token_is_used_and_seen_nowhere(
    tmp_path: Path, issuer: Issuer, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    token = issuer.token("app", "pull")
    seen: list[bytes] = []

    def look(what: str, done: int, total: int) -> None:
        for process in skopeos():
            with contextlib.suppress(OSError):
                seen.append((process / "cmdline").read_bytes() + (process / "environ").read_bytes())

    name = f"{registry.host}/app:large"
    async with opened(tmp_path, settings(tmp_path, registry)) as store:
        image = await store.pull(name, RegistryAuth(registry_token=token), progress=look)
        assert image.layers[0].diff_id == sha(A)
        assert image.repo_tags == (name,)
        assert seen, "skopeo was never caught running"
        assert not any(token.encode() in text for text in seen)
        assert token not in caplog.text
        with pytest.raises(ImageError, match="the registry denies access"):
            await store.pull(name, RegistryAuth(registry_token="not.a.token"))
        with pytest.raises(ImageError, match="the registry denies access"):
            await store.pull(name, RegistryAuth(registry_token=token, server_address="other.example"))
    assert issuer.exchanged == []


async def test_an_identity_token_is_exchanged(tmp_path: Path, issuer: Issuer, registry: Registry) -> None:
    async with opened(tmp_path, settings(tmp_path, registry)) as store:
        image = await store.pull(f"{registry.host}/app:1", RegistryAuth(identity_token=IDENTITY))
        assert image.layers
        with pytest.raises(ImageError, match="the registry denies access"):
            await store.pull(f"{registry.host}/app:1", RegistryAuth(identity_token="another"))
    assert {form["grant_type"][0] for form in issuer.exchanged} == {"refresh_token"}
    issuer.exchanged.clear()


# --- signatures -------------------------------------------------------------------------------------------------------


class Signer:
    """A GnuPG key, a registry with images that it signed under a name each, and where the signatures lie."""

    def __init__(self, directory: Path, registry: Registry) -> None:
        self.registry = registry
        home = directory / "gnupg"
        home.mkdir(mode=0o700)
        self._environment = {"GNUPGHOME": str(home), "PATH": "/usr/bin:/bin", "HOME": str(directory)}
        self._run("gpg", "--batch", "--passphrase", "", "--quick-gen-key", "signer@example", "rsa2048", "sign", "never")
        self.key = directory / "key.gpg"
        self.key.write_bytes(self._run("gpg", "--batch", "--export", "signer@example"))
        self.registries_d = directory / "registries.d"
        self.registries_d.mkdir()
        place = f"file://{directory}/signatures"
        # The older spelling of lookaside, which every skopeo reads.
        self.registries_d.joinpath("default.yaml").write_text(
            f"default-docker:\n  sigstore: {place}\n  sigstore-staging: {place}\n"
        )

    def _run(self, *argv: str) -> bytes:
        return subprocess.run(argv, env=self._environment, check=True, capture_output=True).stdout

    def sign(self, tag: str, new_tag: str) -> None:
        """Copy an image of the registry to a new name, signed."""
        self._run(
            *("skopeo", "--registries.d", str(self.registries_d), "copy", "--quiet"),
            *("--src-tls-verify=false", "--dest-tls-verify=false", "--sign-by", "signer@example"),
            *(f"docker://{self.registry.host}/{tag}", f"docker://{self.registry.host}/{new_tag}"),
        )

    def copy(self, name: str, new_name: str) -> None:
        """Copy an image of the registry with the signatures that it has, as they are."""
        self._run(
            *("skopeo", "--registries.d", str(self.registries_d), "--insecure-policy", "copy", "--quiet"),
            *("--src-tls-verify=false", "--dest-tls-verify=false"),
            *(f"docker://{self.registry.host}/{name}", f"docker://{self.registry.host}/{new_name}"),
        )

    def digest(self, name: str) -> str:
        """Return the digest of what a name is."""
        return sha(
            self._run("skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{self.registry.host}/{name}")
        )

    def stop(self) -> None:
        """End the agent that gpg starts."""
        subprocess.run(["gpgconf", "--kill", "all"], env=self._environment, check=True, capture_output=True)


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Signer]:
    registry = Registry(tmp_path_factory.mktemp("signed"))
    registry.push("plain", "1", [A])
    registry.push("plain", "2", [B])
    signer = Signer(tmp_path_factory.mktemp("signer"), registry)
    signer.sign("plain:1", "app:1")
    signer.sign("plain:2", "app:2")
    yield signer
    signer.stop()
    registry.stop()


@pytest.mark.parametrize(
    ("identity", "tag", "allowed"),
    [
        ({}, "app:1", True),
        ({"type": "matchExact"}, "app:1", True),
        ({"type": "matchRepository"}, "app:1", True),
        ({"type": "exactReference", "dockerReference": "{host}/app:1"}, "app:1", True),
        ({"type": "exactReference", "dockerReference": "{host}/app:2"}, "app:1", False),
        # A copy that its signer did not make: the content is signed, but as something else.
        ({}, "app:moved", False),
        ({"type": "matchExact"}, "app:moved", False),
        ({"type": "matchRepository"}, "app:moved", True),
        ({"type": "remapIdentity", "prefix": "{host}/mirror", "signedPrefix": "{host}"}, "mirror/app:1", True),
        ({"type": "remapIdentity", "prefix": "{host}/mirror", "signedPrefix": "{host}"}, "mirror/app:moved", False),
        ({"type": "matchRepository"}, "plain:1", False),
        ({"type": "matchExact"}, "app:1@digest", False),
        ({}, "app:1@digest", True),
    ],
)
async def test_signatures(tmp_path: Path, signer: Signer, identity: dict[str, str], tag: str, allowed: bool) -> None:
    host = signer.registry.host
    # What an attacker could do with the registry and its signatures, and what a mirror does: copy both.
    if tag in ("app:moved", "mirror/app:1", "mirror/app:moved"):
        signer.copy("app:1", tag)
    if tag.endswith("@digest"):
        tag = f"app@{signer.digest('app:1')}"
    identity = {key: value.format(host=host) for key, value in identity.items()}
    requirement: dict[str, object] = {"type": "signedBy", "keyType": "GPGKeys", "keyPath": str(signer.key)}
    if identity:
        requirement["signedIdentity"] = identity
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps({"default": [{"type": "reject"}], "transports": {"docker": {host: [requirement]}}}))
    config = settings(tmp_path, signer.registry, policy_json=str(policy), registries_d=str(signer.registries_d))
    async with opened(tmp_path, config) as store:
        if allowed:
            assert (await store.pull(f"{host}/{tag}")).layers[0].diff_id == sha(A)
            return
        with pytest.raises(SignatureError) as caught:
            await store.pull(f"{host}/{tag}")
        assert str(caught.value).startswith("SignatureValidationFailed: ")
        assert store.list() == []
