"""The signature policy (containers-policy.json(5)) for a pull that goes by digest although a tag was asked for.

skopeo compares the name in a signature with the name it was given. vmrt gives it the digest that the tag had, so that
what was allowed is what is used; but then `matchExact` can never match, and `matchRepoDigestOrExact` (the default)
takes the signature of any tag of the repository: whoever controls the registry could answer for "app:2" with a signed,
outdated "app:1". So for such a pull these identities become `exactReference`, with the reference that was asked for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from vmrt.errors import ImageError
from vmrt.images.reference import Reference

_SIGNED = frozenset({"signedBy", "sigstoreSigned"})


def for_tag(policy: bytes, reference: Reference) -> bytes:
    """Return the policy with which the image that `reference`, a tag, names may be fetched by its digest.

    Raises `ImageError` for what is no policy.
    """
    try:
        document = json.loads(policy, object_pairs_hook=_object)
        lists = [document.get("default", []), *(v for t in document.get("transports", {}).values() for v in t.values())]
        for requirements in lists:
            for requirement in requirements:
                if requirement.get("type") in _SIGNED:
                    requirement["signedIdentity"] = _identity(requirement.get("signedIdentity"), reference)
    except (ValueError, AttributeError, TypeError, KeyError) as e:
        raise ImageError(f"the signature policy is malformed: {e}", hint="see images.policy_json") from e
    return json.dumps(document).encode()


def _identity(identity: dict[str, Any] | None, reference: Reference) -> dict[str, Any]:
    kind = "matchRepoDigestOrExact" if identity is None else identity["type"]
    name = reference.name
    if kind == "remapIdentity" and identity is not None:
        prefix, signed = str(identity["prefix"]), str(identity["signedPrefix"])
        # A prefix ends where a component of the name does (containers/image, refMatchesPrefix).
        if f"{name}/".startswith(f"{prefix}/"):
            name = signed + name[len(prefix) :]
    elif kind not in ("matchExact", "matchRepoDigestOrExact"):
        assert identity is not None
        return identity  # about the repository only, or about a fixed name
    return {"type": "exactReference", "dockerReference": f"{name}:{reference.tag}"}


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    # skopeo refuses a policy that says something twice; taking the last one here would hide it.
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found
