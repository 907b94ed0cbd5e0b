"""What is told to skopeo (credentials) and understood from it (errors)."""

import base64
import json
import tomllib
from pathlib import Path

import pytest

from vmrt.config import ImageConfig
from vmrt.errors import (
    ExhaustedError,
    ImageError,
    InvalidArgumentError,
    RegistryUnavailableError,
    SignatureError,
    VmrtError,
)
from vmrt.images.bearer import Door
from vmrt.images.reference import parse
from vmrt.images.skopeo import Session, auth_document, bearer_token, explain
from vmrt.model import RegistryAuth


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    ("auth", "entry"),
    [
        (None, None),
        (RegistryAuth(), None),
        (RegistryAuth(username="u", password="p:q"), {"auth": b64("u:p:q")}),
        (RegistryAuth(auth=b64("u:p")), {"auth": b64("u:p")}),
        (RegistryAuth(auth=b64("u:p\0\0")), {"auth": b64("u:p")}),
        (RegistryAuth(identity_token="t"), {"auth": b64("<token>:"), "identitytoken": "t"}),
        (RegistryAuth(username="u", password="p", server_address="https://r.example/v2/"), {"auth": b64("u:p")}),
        (RegistryAuth(username="u", password="p", server_address="r.example"), {"auth": b64("u:p")}),
        (RegistryAuth(username="u", password="p", server_address="other.example"), None),
    ],
)
def test_auth_file(auth: RegistryAuth | None, entry: dict[str, str] | None) -> None:
    assert auth_document(auth, "r.example") == {"auths": {} if entry is None else {"r.example": entry}}


def test_docker_hub_has_several_names() -> None:
    auth = RegistryAuth(username="u", password="p", server_address="https://index.docker.io/v1/")
    assert auth_document(auth, "docker.io") == {"auths": {"docker.io": {"auth": b64("u:p")}}}


@pytest.mark.parametrize("text", ["%%%", b64("no colon")])
def test_malformed_auth_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"auth\.auth") as caught:
        auth_document(RegistryAuth(auth=text), "r.example")
    assert text not in str(caught.value)


@pytest.mark.parametrize(
    ("auth", "token"),
    [
        (None, ""),
        (RegistryAuth(registry_token="a.b-c=="), "a.b-c=="),
        (RegistryAuth(registry_token="t", server_address="https://r.example/v2/"), "t"),
        (RegistryAuth(registry_token="t", server_address="other.example"), ""),
        (RegistryAuth(registry_token="t", username="u", password="p"), ""),
        (RegistryAuth(registry_token="t", identity_token="i"), ""),
        (RegistryAuth(registry_token="t", auth=b64("u:p")), ""),
    ],
)
def test_when_a_bearer_token_counts(auth: RegistryAuth | None, token: str) -> None:
    assert bearer_token(auth, "r.example") == token


def test_a_bearer_token_that_would_be_more_than_a_header_value_is_refused_and_not_shown() -> None:
    with pytest.raises(InvalidArgumentError, match=r"auth\.registry_token") as caught:
        bearer_token(RegistryAuth(registry_token="secret\r\nHost: evil"), "r.example")
    assert "secret" not in str(caught.value)


def test_a_session_behind_a_door_knows_nothing_but_the_door(tmp_path: Path) -> None:
    door = Door("127.0.0.1:9", "pass")
    config = ImageConfig(registries_conf="/etc/elsewhere.conf")
    Session(parse("r.example/a/b:1"), RegistryAuth(registry_token="secret"), config, tmp_path, door)
    assert json.loads((tmp_path / "auth.json").read_text()) == {"auths": {"127.0.0.1:9": {"auth": b64("vmrt:pass")}}}
    conf = tomllib.loads((tmp_path / "registries.conf").read_text())
    assert conf["registry"] == [{"prefix": "r.example/a/b", "location": "127.0.0.1:9/a/b", "insecure": True}]
    assert not any("secret" in file.read_text() for file in tmp_path.iterdir())


def test_the_auth_file_is_private(tmp_path: Path) -> None:
    Session(parse("r.example/x"), RegistryAuth(username="u", password="p"), ImageConfig(), tmp_path)
    assert (tmp_path / "auth.json").stat().st_mode & 0o777 == 0o600


def fatal(text: str) -> str:
    return f'time="2026-01-01T00:00:00Z" level=fatal msg="{text}"\n'


# As skopeo 1.9.3 prints them; the end-to-end tests make the real ones happen.
PARSING = 'Error parsing image name \\"docker://r/x:1\\": '


@pytest.mark.parametrize(
    ("stderr", "kind", "text"),
    [
        (PARSING + "pinging container registry r: dial tcp 127.0.0.1:1: connect: connection refused",
         RegistryUnavailableError, "cannot be reached"),
        (PARSING + "dial tcp: lookup nosuch.invalid: no such host", RegistryUnavailableError, "cannot be reached"),
        (PARSING + "received unexpected HTTP status: 503 Service Unavailable", RegistryUnavailableError, "reached"),
        (PARSING + "reading manifest 1 in r/x: manifest unknown: manifest unknown", ImageError, "no such image"),
        (PARSING + "unable to retrieve auth token: invalid username/password: unauthorized", ImageError, "denies"),
        (PARSING + "x509: certificate signed by unknown authority", ImageError, "TLS"),
        (PARSING + "http: server gave HTTP response to HTTPS client", ImageError, "TLS"),
        (PARSING + "reading manifest 1: toomanyrequests: slow down", ImageError, "limits the rate"),
        ("Source image rejected: Running image docker://r/x:1 is rejected by policy.", SignatureError, "refuses"),
        ("writing blob: write /x: no space left on device", ExhaustedError, "no space"),
        ("Error loading trust policy: open /nonexist: no such file or directory", ImageError, "configuration is wrong"),
        ("Digest did not match, expected sha256:0, got sha256:1", ImageError, "does not have the digest"),
        ("something new", ImageError, "skopeo failed: something new"),
    ],
)  # fmt: skip
def test_what_skopeo_says(stderr: str, kind: type[VmrtError], text: str) -> None:
    error = explain(fatal(stderr), "fetch manifest", "image r/x:1")
    assert type(error) is kind
    assert text in str(error)
    assert "image r/x:1" in str(error)


def test_kubelet_sees_its_words_first() -> None:
    assert str(explain(fatal("connection refused"), "p", "r")).startswith("RegistryUnavailable: ")
    assert str(explain(fatal("Source image rejected: x"), "p", "r")).startswith("SignatureValidationFailed: ")
