"""Manifests, indexes and configurations from hostile hands."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmrt.errors import ImageError
from vmrt.images import manifest
from vmrt.images.manifest import Index, Manifest

D = "sha256:" + "a" * 64
E = "sha256:" + "b" * 64
HOST = manifest.host_architecture()


def encoded(value: object) -> bytes:
    return json.dumps(value).encode()


def one(**changes: object) -> bytes:
    document = {"schemaVersion": 2, "config": {"digest": D, "size": 2}, "layers": [{"digest": E, "size": 3}]}
    return encoded({**document, **changes})


def test_a_manifest() -> None:
    parsed = manifest.parse(one(), "x")
    assert isinstance(parsed, Manifest)
    assert (parsed.config.digest, parsed.layers[0].size) == (D, 3)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"{", "malformed manifest"),
        (b"[]", "malformed manifest"),
        (b"\xff", "malformed manifest"),
        (one(schemaVersion=1), "schema 1"),
        (one(config=None), "no configuration"),
        (one(layers=None), "no configuration or no layers"),
        (one(manifests=[]), "at once"),
        (one(config={"digest": "sha256:../../etc", "size": 1}), "malformed descriptor"),
        (one(layers=[{"digest": D, "size": -1}]), "malformed descriptor"),
        (one(layers=[{"digest": D, "size": "1"}]), "malformed manifest"),
        (one(layers=[{"digest": D, "size": 1}] * 500), "more than 499"),
    ],
)
def test_refused_manifests(data: bytes, text: str) -> None:
    with pytest.raises(ImageError, match=text):
        manifest.parse(data, "image x")


@given(st.binary(max_size=200))
def test_any_bytes_parse_or_are_refused(data: bytes) -> None:
    for parse in (manifest.parse, manifest.parse_config):
        with pytest.raises(ImageError):
            parse(data, "x")


def platform(os: str, architecture: str, variant: str = "", digest: str = D) -> dict[str, object]:
    return {"digest": digest, "size": 1, "platform": {"os": os, "architecture": architecture, "variant": variant}}


def chosen(*manifests: dict[str, object]) -> str:
    index = manifest.parse(encoded({"schemaVersion": 2, "manifests": manifests}), "x")
    assert isinstance(index, Index)
    return manifest.choose(index, "image x").digest


def test_the_hosts_platform_is_chosen() -> None:
    assert chosen(platform("linux", "mips"), platform("windows", HOST), platform("linux", HOST, digest=E)) == E
    assert chosen({"digest": E, "size": 1}) == E
    if HOST == "amd64":
        assert chosen(platform("linux", HOST, "v3"), platform("linux", HOST, digest=E)) == E
    with pytest.raises(ImageError, match=rf"no image for linux/{HOST}.*it has linux/mips, windows/"):
        chosen(platform("linux", "mips"), platform("windows", HOST), platform("unknown", "unknown"))


def test_configuration() -> None:
    config, diff_ids = manifest.parse_config(
        encoded(
            {
                "os": "linux",
                "config": {"Entrypoint": ["/e"], "Cmd": None, "Env": ["A=b"], "User": "1:2", "Labels": {"l": "v"},
                           "WorkingDir": "/w", "StopSignal": "SIGINT", "Volumes": {"/b": {}, "/a": {}}, "Unknown": 1},
                "rootfs": {"type": "layers", "diff_ids": [D, E]},
            }
        ),
        "x",
    )  # fmt: skip
    assert (config.entrypoint, config.cmd, config.env, config.user) == (("/e",), (), ("A=b",), "1:2")
    assert (config.labels, config.working_dir, config.stop_signal) == ({"l": "v"}, "/w", "SIGINT")
    assert config.volumes == ("/a", "/b")
    assert diff_ids == (D, E)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({}, "names no layers"),
        ({"rootfs": {"type": "layers", "diff_ids": ["../x"]}}, "malformed diff ID"),
        ({"os": "windows", "rootfs": {"type": "layers"}}, "the image is for windows"),
        ({"architecture": "mips", "rootfs": {"type": "layers"}}, "the image is for linux/mips"),
    ],
)
def test_refused_configurations(value: object, text: str) -> None:
    with pytest.raises(ImageError, match=text):
        manifest.parse_config(encoded(value), "x")
