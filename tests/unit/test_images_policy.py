"""The signature policy of a pull by tag: which identities are tied to the tag that was asked for."""

from __future__ import annotations

import json

import pytest

from vmrt.errors import ImageError
from vmrt.images.policy import for_tag
from vmrt.images.reference import parse

TAG = parse("r.example:5000/team/app:2")


def requirement(**identity: str) -> dict[str, object]:
    found: dict[str, object] = {"type": "signedBy", "keyType": "GPGKeys", "keyPath": "/k"}
    return found | ({"signedIdentity": identity} if identity else {})


@pytest.mark.parametrize(
    ("identity", "wanted"),
    [
        ({}, "r.example:5000/team/app:2"),
        ({"type": "matchExact"}, "r.example:5000/team/app:2"),
        ({"type": "matchRepoDigestOrExact"}, "r.example:5000/team/app:2"),
        ({"type": "remapIdentity", "prefix": "r.example:5000/team", "signedPrefix": "up.example"}, "up.example/app:2"),
        (
            {"type": "remapIdentity", "prefix": "r.example:5000/team/app", "signedPrefix": "up.example/x"},
            "up.example/x:2",
        ),
        ({"type": "remapIdentity", "prefix": "r.example:5000/te", "signedPrefix": "x"}, "r.example:5000/team/app:2"),
        ({"type": "remapIdentity", "prefix": "r.example", "signedPrefix": "x"}, "r.example:5000/team/app:2"),
    ],
)
def test_identities_that_depend_on_the_tag_name_it(identity: dict[str, str], wanted: str) -> None:
    policy = {
        "default": [{"type": "reject"}],
        "transports": {"docker": {"r.example:5000": [requirement(**identity)], "": [{"type": "reject"}]}},
    }
    got = json.loads(for_tag(json.dumps(policy).encode(), TAG))
    changed = requirement(type="exactReference", dockerReference=wanted)
    assert got["transports"]["docker"] == {"r.example:5000": [changed], "": [{"type": "reject"}]}
    assert got["default"] == [{"type": "reject"}]


@pytest.mark.parametrize(
    "identity",
    [
        {"type": "matchRepository"},
        {"type": "exactReference", "dockerReference": "x.example/y:1"},
        {"type": "exactRepository", "dockerRepository": "x.example/y"},
    ],
)
def test_other_identities_stay(identity: dict[str, str]) -> None:
    policy = {
        "default": [requirement(**identity), {"type": "sigstoreSigned", "keyPath": "/s", "signedIdentity": identity}]
    }
    assert json.loads(for_tag(json.dumps(policy).encode(), TAG)) == policy


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"default": [1]}',
        '{"default": {}, "default": []}',
        '{"default": [{"type": "signedBy", "signedIdentity": {}}]}',
        '{"default": [{"type": "signedBy", "signedIdentity": {"type": "remapIdentity"}}]}',
        '{"transports": []}',
    ],
)
def test_what_is_no_policy_is_refused(text: str) -> None:
    with pytest.raises(ImageError, match="the signature policy is malformed"):
        for_tag(text.encode(), TAG)
