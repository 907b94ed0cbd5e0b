"""How the agent refuses: a gRPC status code and a message that names the resource.

The numbers are those of grpc/doc/statuscodes.md; the host's end maps them to its own error tree.
"""

from __future__ import annotations

# Plain integers: an enum would cost a class build at every boot for nothing.
UNKNOWN = 2
INVALID_ARGUMENT = 3
DEADLINE_EXCEEDED = 4
NOT_FOUND = 5
ALREADY_EXISTS = 6
PERMISSION_DENIED = 7
RESOURCE_EXHAUSTED = 8
FAILED_PRECONDITION = 9
# gRPC's ABORTED, in CreateContainer's answer only: an image storage could not be mounted.
IMAGE_STORAGE = 10
OUT_OF_RANGE = 11
UNIMPLEMENTED = 12
INTERNAL = 13

# A message never fills a frame: crun and the kernel quote what containers chose.
MAX_MESSAGE_CHARS = 4096


class AgentError(Exception):
    """A call or stream is refused with a gRPC status `code` and a `message` for a person."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        # Undecodable octets (surrogates) cannot travel in a protobuf string.
        self.message = message.encode(errors="replace").decode()[:MAX_MESSAGE_CHARS]


def from_os_error(e: OSError, phase: str) -> AgentError:
    """Translate an `OSError` met in `phase` into INTERNAL, naming file and errno's text."""
    where = f" {e.filename}" if e.filename else ""
    return AgentError(INTERNAL, f"{phase}:{where} {e.strerror or e}")
