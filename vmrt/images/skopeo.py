"""skopeo as the fetcher: registries' protocols, mirrors, credentials, manifest lists and signatures are its business.

One `Session` serves one pull. Its rules:

- Credentials go into an auth file (containers-auth.json(5)), mode 0600 in a 0700 directory that is removed afterwards,
  and nowhere else: never into arguments, the environment or a log. The daemon's own login files are never used.
  A bearer token, which no such file takes, goes by way of bearer.py.
- What the reference names is read first (`manifest`), and everything after that goes by digest: what the policy
  allowed is what is used, even where a tag moves meanwhile.
- `copy` writes blobs into a directory by digest. A file that is there already under a blob's name keeps skopeo from
  fetching that blob (containers/image, oci layout: TryReusingBlob), whatever it holds: sparse placeholders stand for
  layers that the store has. The OCI manifest and configuration that skopeo writes beside them are not used, because it
  rewrites those of Docker's kind; the originals come from `manifest` and `config`.
- What skopeo says when it fails is understood here and nowhere else (`explain`).
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from vmrt import spawn
from vmrt.config import ImageConfig
from vmrt.errors import (
    ExhaustedError,
    ImageError,
    InvalidArgumentError,
    ProcessError,
    RegistryUnavailableError,
    SignatureError,
    VmrtError,
)
from vmrt.images import policy as policies
from vmrt.images.bearer import Door
from vmrt.images.blob import digest as digest_of
from vmrt.images.manifest import CONFIG_LIMIT_BYTES, MANIFEST_LIMIT_BYTES, host_architecture
from vmrt.images.reference import Reference
from vmrt.model import RegistryAuth

INSPECT_TIMEOUT_S = 120.0
DEFAULT_POLICY = "/etc/containers/policy.json"
_DOCKER_HUB = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})
# Variables that would make skopeo find somebody's login.
_DROPPED_ENV = frozenset({"REGISTRY_AUTH_FILE", "DOCKER_CONFIG", "XDG_CONFIG_HOME", "XDG_DATA_HOME"})


class Session:
    """One reference on its registry. `directory` is private to the session and exists; its owner removes it."""

    def __init__(
        self,
        reference: Reference,
        auth: RegistryAuth | None,
        config: ImageConfig,
        directory: Path,
        door: Door | None = None,
    ) -> None:
        self._reference = reference
        self._directory = directory
        self._global: list[str | Path] = ["skopeo", "--override-os", "linux", "--override-arch", host_architecture()]
        if (policy := self._policy(config.policy_json)) is not None:
            self._global += ["--policy", policy]
        if config.registries_d:
            self._global += ["--registries.d", config.registries_d]
        if door is not None:
            conf = directory / "registries.conf"
            conf.write_text(door.registries_conf(reference))
            self._global += ["--registries-conf", conf]
            accounts = auth_document(door.auth(), door.address)
        else:
            if config.registries_conf:
                self._global += ["--registries-conf", config.registries_conf]
            accounts = auth_document(auth, reference.registry)
        self._authfile = directory / "auth.json"
        fd = os.open(self._authfile, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(json.dumps(accounts).encode())
        self._env = {name: value for name, value in os.environ.items() if name not in _DROPPED_ENV}
        self._env |= {"HOME": str(directory), "XDG_RUNTIME_DIR": str(directory), "TMPDIR": str(directory)}

    def _policy(self, configured: str) -> str | Path | None:
        """Return the policy file for this pull; None leaves it to skopeo to miss its default one."""
        if self._reference.digest:
            return configured or None
        try:
            text = Path(configured or DEFAULT_POLICY).read_bytes()
        except OSError:
            return configured or None  # skopeo says what is wrong with it
        path = self._directory / "policy.json"
        path.write_bytes(policies.for_tag(text, self._reference))
        return path

    async def manifest(self, digest: str = "") -> bytes:
        """Return the manifest or index that the reference (or `digest` in its repository) names, as stored."""
        wanted = digest or self._reference.digest
        data = await self._run(
            ["inspect", "--raw", "--authfile", self._authfile, self._source(wanted)], "fetch manifest"
        )
        if len(data) > MANIFEST_LIMIT_BYTES:
            raise self._error("the manifest is too large", "fetch manifest")
        if wanted and digest_of(data) != wanted:
            raise self._error(f"the registry answered with {digest_of(data)} for {wanted}", "fetch manifest")
        return data

    async def config(self, digest: str) -> bytes:
        """Return the configuration of the image whose manifest has this digest, as stored."""
        arguments: list[str | Path] = [
            "inspect",
            "--raw",
            "--config",
            "--authfile",
            self._authfile,
            self._source(digest),
        ]
        data = await self._run(arguments, "fetch configuration")
        if len(data) > CONFIG_LIMIT_BYTES:
            raise self._error("the configuration is too large", "fetch configuration")
        return data

    async def copy(self, digest: str, blobs: Path) -> None:
        """Fetch the blobs of the manifest with this digest into ``<blobs>/sha256/<hex>``; each appears when whole.

        The signature policy is applied here. Cancellation kills skopeo; what it left goes with the session's directory.
        """
        arguments: list[str | Path] = ["copy", "--quiet", "--src-authfile", self._authfile]
        # Without it skopeo compresses what the registry has uncompressed.
        arguments += ["--dest-oci-accept-uncompressed-layers", "--dest-shared-blob-dir", blobs]
        # They have been looked at by then; a layout cannot hold them, and skopeo would refuse every signed image.
        arguments += ["--remove-signatures"]
        # Relative, because a colon in an oci: path would end it.
        arguments += [self._source(digest), "oci:layout:image"]
        await self._run(arguments, "fetch layers", timeout_s=None)

    def _source(self, digest: str) -> str:
        reference = self._reference
        return f"docker://{reference.at(digest)}" if digest else f"docker://{reference.name}:{reference.tag}"

    async def _run(
        self, arguments: Sequence[str | Path], phase: str, timeout_s: float | None = INSPECT_TIMEOUT_S
    ) -> bytes:
        argv = [*self._global, *arguments]
        try:
            done = await spawn.run(
                argv, env=self._env, cwd=self._directory, timeout_s=timeout_s, phase=phase, resource=self._resource
            )
        except ProcessError as e:
            if e.status < 0:
                raise self._error(e.message, phase, e.hint) from e
            raise explain(e.stderr, phase, self._resource) from e
        return done.stdout

    @property
    def _resource(self) -> str:
        return f"image {self._reference}"

    def _error(self, message: str, phase: str, hint: str = "") -> ImageError:
        return ImageError(message, phase=phase, resource=self._resource, hint=hint)


# What skopeo 1.9 (containers/image 5.22) and registries say; the first that matches wins. Mirrors' messages stand
# before the registry's own in one line, so the causes that say more come first. Held to the real things by
# tests/e2e/test_image_registry.py.
_CAUSES: tuple[tuple[str, type[VmrtError], str, str], ...] = (
    (
        r"loading trust policy|loading registries configuration|open /\S*policy\.json",
        ImageError,
        "skopeo's configuration is wrong",
        "see images.policy_json and images.registries_conf",
    ),
    (
        r"rejected by policy|Source image rejected|signature",
        SignatureError,
        "the policy refuses the image",
        "see images.policy_json",
    ),
    (r"no space left on device|disk quota exceeded", ExhaustedError, "no space left on device", "remove images"),
    (
        r"does not match provided manifest digest|Digest did not match|digest .* mismatch|did not match",
        ImageError,
        "the registry's content does not have the digest it is named by",
        "",
    ),
    (r"toomanyrequests|429 \(?Too Many", ImageError, "the registry limits the rate of requests", "try again later"),
    (
        r"unauthorized|authentication required|invalid username/password|access to the resource is denied|\b403\b",
        ImageError,
        "the registry denies access",
        "check the credentials, and that the repository exists",
    ),
    (
        r"manifest unknown|name unknown|manifest invalid|repository name not known|\b404\b",
        ImageError,
        "the registry has no such image",
        "check the name and the tag or digest",
    ),
    (
        r"x509|certificate|server gave HTTP response to HTTPS client",
        ImageError,
        "no trusted TLS connection to the registry",
        "see registries.conf, `insecure`, and /etc/containers/certs.d",
    ),
    (
        r"connection refused|no such host|timeout|connection reset|unreachable|no route to host|EOF|\b50[0-9]\b"
        r"|server misbehaving|pinging container registry",
        RegistryUnavailableError,
        "the registry cannot be reached",
        "",
    ),
)
_CAUSE_EXPRESSIONS = tuple((re.compile(pattern), kind, text, hint) for pattern, kind, text, hint in _CAUSES)
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
_LOG_MESSAGE = re.compile(r'level=fatal msg="((?:[^"\\]|\\.)*)"')


def explain(stderr: str, phase: str, resource: str) -> VmrtError:
    """Turn skopeo's stderr into the error that a client should see."""
    found = _LOG_MESSAGE.search(stderr)
    detail = found.group(1).replace('\\"', '"') if found else stderr.strip()
    for expression, kind, text, hint in _CAUSE_EXPRESSIONS:
        if expression.search(detail):
            return kind(f"{text}: {detail}", phase=phase, resource=resource, hint=hint)
    return ImageError(f"skopeo failed: {detail or 'no message'}", phase=phase, resource=resource)


def bearer_token(auth: RegistryAuth | None, registry: str) -> str:
    """Return the bearer token to use at `registry`, "" for none. What skopeo has a better way for goes before it."""
    if auth is None or auth.username or auth.password or auth.auth or auth.identity_token:
        return ""
    if not meant_for(auth, registry):
        return ""
    if not _TOKEN.fullmatch(auth.registry_token):
        if auth.registry_token:
            raise InvalidArgumentError("auth.registry_token is no bearer token (RFC 6750, section 2.1)")
        return ""
    return auth.registry_token


def meant_for(auth: RegistryAuth, registry: str) -> bool:
    """Say whether credentials may go to `registry`: those with another server's address may not."""
    return not auth.server_address or _host(auth.server_address) == _canonical(registry)


def auth_document(auth: RegistryAuth | None, registry: str) -> dict[str, dict[str, dict[str, str]]]:
    """Return the auth file's content for a pull from `registry`; credentials meant for another server are left out."""
    if auth is None or not meant_for(auth, registry):
        return {"auths": {}}
    if auth.username or auth.password:
        entry = {"auth": base64.b64encode(f"{auth.username}:{auth.password}".encode()).decode()}
    elif auth.auth:
        try:
            decoded = base64.b64decode(auth.auth, validate=True).rstrip(b"\0")
        except binascii.Error as e:
            raise InvalidArgumentError("auth.auth is not base64") from e
        if b":" not in decoded:
            raise InvalidArgumentError("auth.auth does not hold user:password")
        entry = {"auth": base64.b64encode(decoded).decode()}
    elif auth.identity_token:
        # The token stands for the password; the file's format still wants a user.
        entry = {"auth": base64.b64encode(b"<token>:").decode(), "identitytoken": auth.identity_token}
    else:
        return {"auths": {}}
    return {"auths": {registry: entry}}


def _host(server_address: str) -> str:
    """Return the host[:port] of what kubelet and docker write as a server: a URL or a bare host."""
    text = server_address if "://" in server_address else f"//{server_address}"
    return _canonical(urlsplit(text).netloc)


def _canonical(registry: str) -> str:
    return "docker.io" if registry in _DOCKER_HUB else registry
