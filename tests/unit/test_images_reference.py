"""References: the distribution project's grammar, its defaults, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmrt.errors import InvalidArgumentError
from vmrt.images.reference import id_prefix, parse

D = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("busybox", "docker.io/library/busybox:latest"),
        ("busybox:1.36", "docker.io/library/busybox:1.36"),
        ("library/busybox", "docker.io/library/busybox:latest"),
        ("user/app", "docker.io/user/app:latest"),
        ("index.docker.io/busybox", "docker.io/library/busybox:latest"),
        ("registry.k8s.io/pause:3.9", "registry.k8s.io/pause:3.9"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/a/b:tag", "localhost:5000/a/b:tag"),
        ("127.0.0.1:5000/app", "127.0.0.1:5000/app:latest"),
        ("[::1]:5000/app:x", "[::1]:5000/app:x"),
        ("HOST/app", "HOST/app:latest"),
        ("a--b/c__d/e.f_g", "docker.io/a--b/c__d/e.f_g:latest"),
        (f"busybox@{D}", f"docker.io/library/busybox@{D}"),
        (f"busybox:1.36@{D}", f"docker.io/library/busybox@{D}"),
        ("x:" + "t" * 128, "docker.io/library/x:" + "t" * 128),
        ("x:_under.score-", "docker.io/library/x:_under.score-"),
    ],
)
def test_full_form(text: str, canonical: str) -> None:
    assert parse(text).canonical == canonical
    assert parse(canonical).canonical == canonical


def test_tag_and_digest_are_both_kept() -> None:
    reference = parse(f"a.b/c:t@{D}")
    assert (reference.registry, reference.repository, reference.tag, reference.digest) == ("a.b", "c", "t", D)
    assert str(reference) == f"a.b/c:t@{D}"


def test_another_default_registry() -> None:
    assert parse("busybox", "mirror.example").canonical == "mirror.example/busybox:latest"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty"),
        ("UPPER", "lower case"),
        ("repo/Upper", "lower case"),
        ("a//b", "path component"),
        ("/a", "path component"),
        ("a/", "path component"),
        ("a..b", "path component"),
        ("-a", "path component"),
        ("a_", "path component"),
        ("a b", "path component"),
        ("../../etc/passwd", "host"),
        ("a:", "tag"),
        ("a:.x", "tag"),
        ("a:" + "t" * 129, "tag"),
        ("a@sha256:abc", "digest"),
        ("a@md5:" + "0" * 64, "digest"),
        (f"a@{D.upper()}", "digest"),
        ("0" * 64, "image id"),
        ("host.x:99999999/a", "host"),
        ("-bad.host/a", "host"),
        ("a.b/" + "x" * 255, "longer than 255"),
        ("a\n", "path component"),
        ("a:t\n", "tag"),
    ],
)
def test_refused_with_the_rule(text: str, why: str) -> None:
    with pytest.raises(InvalidArgumentError, match=why):
        parse(text)


@given(st.text(max_size=60))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        reference = parse(text)
    except InvalidArgumentError:
        return
    assert parse(reference.canonical) in (reference, parse(str(reference.canonical)))
    assert " " not in reference.canonical
    assert not reference.canonical.startswith("-")


def test_id_prefixes() -> None:
    assert id_prefix("abc") == "abc"
    assert id_prefix(D) == D.removeprefix("sha256:")
    assert id_prefix("sha256:") is None
    assert id_prefix("xyz") is None
    assert id_prefix("a" * 65) is None
