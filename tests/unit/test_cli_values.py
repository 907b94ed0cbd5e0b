"""Values on the command line, credentials, and how things are shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmrt.cli.app import Seconds
from vmrt.cli.credentials import collect, from_authfile, registry_and_path
from vmrt.cli.images import split_tag
from vmrt.cli.output import age, aligned, printable, rfc3339, short_id, size
from vmrt.cli.params import Port, PublishedPort, Size, User, UserChoice, Variable
from vmrt.errors import InvalidArgumentError


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (Size(), "0", 0),
        (Size(), "512m", 512 * 1024**2),
        (Size(), "1.5G", 3 * 512 * 1024**2),
        (Size(), "64KiB", 65536),
        (Size(), "2gb", 2 * 1024**3),
        (PublishedPort(), "8080:80", Port(8080, 80)),
        (PublishedPort(), "53:53/udp", Port(53, 53, "udp")),
        (PublishedPort(), "127.0.0.1:1:65535/sctp", Port(1, 65535, "sctp", "127.0.0.1")),
        (PublishedPort(), "[fe80::1]:1:2", Port(1, 2, "tcp", "fe80::1")),
        (Variable(), "A=", ("A", "")),
        (Variable(), "A=b=c", ("A", "b=c")),
        (Variable(), "VMRT_SURELY_UNSET", None),
        (User(), "0", UserChoice(uid=0)),
        (User(), "1:2", UserChoice(uid=1, gid=2)),
        (User(), "www-data:33", UserChoice(name="www-data", gid=33)),
        (Seconds(), "1.5", 1.5),
        (Seconds(), "0", None),
    ],
)
def test_values(kind: click.ParamType[Any], text: str, value: object) -> None:
    assert kind.convert(text, None, None) == value
    assert kind.convert(value, None, None) == value  # click converts defaults again


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        *((Size(), text) for text in ("", "m", "-1", "1x", "1 2", "9999999999999t", "0x10")),
        *((PublishedPort(), text) for text in ("", "80", "0:80", "80:65536", "a:b", "1:2:3:4", "1:2/icmp", "1:2/")),
        *((PublishedPort(), text) for text in ("999.0.0.1:1:2", "[::1:1:2", "[zz]:1:2", "::1:1:2", "1:²")),
        *((Variable(), text) for text in ("", "=x", "A=\0")),
        *((User(), text) for text in ("", ":1", "1:", "1:x", "-1", "a b", "4294967295", "1:4294967295")),
        *((Seconds(), text) for text in ("", "x", "-1", "nan", "inf", "1e99")),
    ],
)
def test_refused_values(kind: click.ParamType[Any], text: str) -> None:
    with pytest.raises(click.BadParameter):
        kind.convert(text, None, None)


@given(st.text())
def test_values_never_do_worse_than_refuse(text: str) -> None:
    for kind in (Size(), PublishedPort(), Variable(), User(), Seconds()):
        try:
            kind.convert(text, None, None)
        except click.BadParameter as e:
            assert e.message


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("alpine", ("docker.io", "library/alpine")),
        ("alpine:3", ("docker.io", "library/alpine")),
        ("team/app", ("docker.io", "team/app")),
        ("localhost/app:1", ("localhost", "app")),
        ("localhost:5000/a/b:1", ("localhost:5000", "a/b")),
        ("reg.example/a/b@sha256:00", ("reg.example", "a/b")),
    ],
)
def test_registry_and_path(reference: str, expected: tuple[str, str]) -> None:
    assert registry_and_path(reference) == expected


@pytest.mark.parametrize(
    ("key", "reference"),
    [
        ("reg.example", "reg.example/team/app:1"),
        ("reg.example/team", "reg.example/team/app:1"),
        ("reg.example/team/app", "reg.example/team/app:1"),
        ("https://reg.example", "reg.example/app"),
        ("https://index.docker.io/v1/", "alpine"),
        ("docker.io", "alpine"),
    ],
)
def test_authfile_keys(tmp_path: Path, key: str, reference: str) -> None:
    path = tmp_path / "auth.json"
    path.write_text(json.dumps({"auths": {key: {"auth": "eDp5"}, "else.example": {"auth": "no"}}}))
    assert from_authfile(path, reference).auth == "eDp5"


def test_the_most_specific_entry_counts(tmp_path: Path) -> None:
    path = tmp_path / "auth.json"
    path.write_text(json.dumps({"auths": {"r.example": {"auth": "wide"}, "r.example/a": {"auth": "narrow"}}}))
    assert from_authfile(path, "r.example/a/b").auth == "narrow"
    assert from_authfile(path, "r.example/c").auth == "wide"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("nonsense", "not JSON"),
        ("[]", "no credentials for r.example"),
        ('{"auths": []}', "no credentials"),
        ('{"auths": {"r.example": 7}}', "no credentials"),
        ('{"auths": {"r.example": {"auth": ""}}}', "no credentials"),
        ('{"auths": {}, "credsStore": "pass"}', "credential helper"),
    ],
)
def test_useless_authfiles(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "auth.json"
    path.write_text(content)
    with pytest.raises(InvalidArgumentError) as caught:
        from_authfile(path, "r.example/a")
    assert says in str(caught.value)


@pytest.mark.parametrize("content", ["", "user", ":pw", "user:pw\nmore"])
def test_useless_credential_files(tmp_path: Path, content: str) -> None:
    path = tmp_path / "creds"
    path.write_text(content)
    with pytest.raises(InvalidArgumentError, match="USERNAME:PASSWORD"):
        collect("a", authfile=None, creds_file=path, username="", password_stdin=False)


def test_contradicting_credentials(tmp_path: Path) -> None:
    with pytest.raises(click.UsageError):
        collect("a", authfile=tmp_path, creds_file=None, username="x", password_stdin=False)
    with pytest.raises(click.UsageError):
        collect("a", authfile=None, creds_file=None, username="", password_stdin=True)
    with pytest.raises(InvalidArgumentError, match="cannot read"):
        collect("a", authfile=None, creds_file=tmp_path / "no", username="", password_stdin=False)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0B"), (999, "999B"), (1000, "1kB"), (12_345_678, "12.3MB"), (999_999, "1MB"), (5 * 10**12, "5TB")],
)
def test_size(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 seconds ago"),
        (1, "1 second ago"),
        (119, "1 minute ago"),
        (7200, "2 hours ago"),
        (90000, "1 day ago"),
        (-5, "0 seconds ago"),
    ],
)
def test_age(seconds: int, text: str) -> None:
    now = 1_800_000_000 * 10**9
    assert age(now - seconds * 10**9, now) == text
    assert age(0, now) == "-"


def test_times_and_ids() -> None:
    assert rfc3339(1_700_000_000_000_000_001) == "2023-11-14T22:13:20.000000001Z"
    assert rfc3339(0) is None
    assert short_id("sha256:" + "a" * 64) == "a" * 13
    assert split_tag("reg:5000/a/b:1") == ("reg:5000/a/b", "1")


@given(st.text())
def test_printable_lets_no_control_through(text: str) -> None:
    shown = printable(text)
    assert len(shown) == len(text)
    assert not any(ord(c) < 32 and c not in "\n\t" for c in shown)
    assert not any(127 <= ord(c) < 160 for c in shown)


@given(st.lists(st.lists(st.text("ab ", max_size=5).map(str.strip), min_size=3, max_size=3), min_size=1))
def test_aligned_columns_start_at_the_same_place(rows: list[list[str]]) -> None:
    lines = aligned([["H1", "H2", "H3"], *rows])
    for number, row in enumerate(rows, 1):
        assert lines[number][lines[0].index("H2") :].startswith(row[1] or "-")
        assert lines[number][lines[0].index("H3") :] == (row[2] or "-")
