"""The one error tree of vmrt.

Every error that crosses a room's door is a `VmrtError`. It carries what a person needs in order to act: the phase that
failed, the resource it failed on, and the next thing to look at. The gRPC code sits on the class, so that one server
wrapper (`vmrt.cri.outcome`) maps the whole tree and no RPC handler does any mapping of its own.

Foreign exceptions (libvirt, pyroute2, subprocesses, the operating system) are translated at the seam where they occur,
with ``raise SomeError(...) from e``; nothing above the seam knows them.
"""

from __future__ import annotations

import enum


class Code(enum.IntEnum):
    """gRPC status codes (grpc/doc/statuscodes.md), repeated here so that only `vmrt.cri` has to import grpc."""

    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14


class VmrtError(Exception):
    """Base of all errors.

    `message` says what failed. `phase` names the step ("boot", "cni add"), `resource` what it concerned
    ("sandbox 3f2a...", "image docker.io/library/x:1"), `hint` what to look at next. All are optional but `message`.
    """

    code: Code = Code.INTERNAL

    def __init__(self, message: str, *, phase: str = "", resource: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.phase = phase
        self.resource = resource
        self.hint = hint

    def __str__(self) -> str:
        where = ", ".join(part for part in (self.phase, self.resource) if part)
        text = f"{where}: {self.message}" if where else self.message
        return f"{text} ({self.hint})" if self.hint else text


class InvalidArgumentError(VmrtError):
    """The request itself is wrong; the message names the field."""

    code = Code.INVALID_ARGUMENT


class UnsupportedError(InvalidArgumentError):
    """The request is well formed, but a virtual machine cannot honour it; the message names the field."""


class NotFoundError(VmrtError):
    """The named sandbox, container, image or other resource does not exist."""

    code = Code.NOT_FOUND


class AlreadyExistsError(VmrtError):
    """A resource with this name exists."""

    code = Code.ALREADY_EXISTS


class FailedPreconditionError(VmrtError):
    """The resource is in a state in which the call is not legal; the message names both states."""

    code = Code.FAILED_PRECONDITION


class IllegalTransitionError(FailedPreconditionError):
    """A state machine was asked for a move that its table does not have."""


class DeadlineError(VmrtError):
    """A time limit set by the caller or by us ran out."""

    code = Code.DEADLINE_EXCEEDED


class ExhaustedError(VmrtError):
    """A bound was reached: disk space, memory, sessions."""

    code = Code.RESOURCE_EXHAUSTED


class UnavailableError(VmrtError):
    """The thing that should answer is not there (daemon stopping, VM gone); trying again may help."""

    code = Code.UNAVAILABLE


class UnimplementedError(VmrtError):
    """The call exists in the interface and not in vmrt."""

    code = Code.UNIMPLEMENTED


class ConfigError(InvalidArgumentError):
    """A configuration file or option is wrong; the message names file and key."""


class ProcessError(VmrtError):
    """A subprocess failed. `argv` can be pasted into a shell; `stderr` is its bounded tail; `status` its exit code."""

    def __init__(
        self,
        message: str,
        *,
        argv: tuple[str, ...] = (),
        status: int = -1,
        stderr: str = "",
        phase: str = "",
        resource: str = "",
        hint: str = "",
    ) -> None:
        super().__init__(message, phase=phase, resource=resource, hint=hint)
        self.argv = argv
        self.status = status
        self.stderr = stderr


class VmError(VmrtError):
    """The hypervisor refused or a VM failed; a boot failure carries `console`, the tail of the guest's console."""

    code = Code.UNKNOWN

    def __init__(self, message: str, *, phase: str = "", resource: str = "", hint: str = "", console: str = "") -> None:
        super().__init__(message, phase=phase, resource=resource, hint=hint)
        self.console = console

    def __str__(self) -> str:
        text = super().__str__()
        return f"{text}\n--- end of the guest's console ---\n{self.console}" if self.console else text


class VmGoneError(UnavailableError):
    """The VM has died or is being destroyed: every call that needs it fails at once with this."""


class AgentError(VmrtError):
    """The guest agent answered a call with an error, or broke its protocol."""

    code = Code.UNKNOWN


class NetworkError(VmrtError):
    """Netns, CNI, tap or traffic-control work failed."""

    code = Code.UNKNOWN


class ImageError(VmrtError):
    """Pulling, converting or storing an image failed.

    Code UNKNOWN on purpose: cri-client strips that code's prefix, so kubelet sees the message from its first word
    on and recognises ``RegistryUnavailable: ...`` and ``SignatureValidationFailed: ...``.
    """

    code = Code.UNKNOWN

    def __str__(self) -> str:
        # The message must stay first (see above); the context follows it.
        context = "; ".join(part for part in (self.phase, self.resource, self.hint) if part)
        return f"{self.message} ({context})" if context else self.message


class RegistryUnavailableError(ImageError):
    """The registry could not be reached; the text starts with the word kubelet looks for."""

    def __init__(self, message: str, *, phase: str = "", resource: str = "", hint: str = "") -> None:
        super().__init__(f"RegistryUnavailable: {message}", phase=phase, resource=resource, hint=hint)


class ImageVolumeError(ImageError):
    """An image could not be mounted as a container's volume; the text starts with the word kubelet looks for."""

    def __init__(self, message: str, *, phase: str = "", resource: str = "", hint: str = "") -> None:
        super().__init__(f"ImageVolumeMountFailed: {message}", phase=phase, resource=resource, hint=hint)


class SignatureError(ImageError):
    """`policy.json` refused the image; the text starts with the word kubelet looks for."""

    def __init__(self, message: str, *, phase: str = "", resource: str = "", hint: str = "") -> None:
        super().__init__(f"SignatureValidationFailed: {message}", phase=phase, resource=resource, hint=hint)
