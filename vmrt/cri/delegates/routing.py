"""Who runs a pod, and how its origin is remembered. Pure functions.

The name of the handler that a client asked for is kept at the delegate itself, as an annotation of the sandbox: made
with it in one step, it cannot be lost by a crash of ours. It is taken away again from everything that clients see.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from vmrt.config import HandlerConfig
from vmrt.cri.fields import unsupported
from vmrt.proto.runtime.v1 import api_pb2 as cri

HANDLER_ANNOTATION = "vmrt.dev/runtime-handler"

_Shown = TypeVar("_Shown", cri.PodSandbox, cri.PodSandboxStatus)


def route(handlers: Mapping[str, HandlerConfig], asked: str, options: cri.NamespaceOption) -> str:
    """Return the name of the delegating handler that takes a pod, "" for a pod of ours.

    `handlers` are all configured ones. A handler that was asked for by name is the one; only a pod that names none is
    sent where its host namespaces are. With several of those, network comes before IPC before PID.
    """
    if asked:
        return asked if asked in handlers and handlers[asked].endpoint else ""
    for key, mode in (("host_network", options.network), ("host_ipc", options.ipc), ("host_pid", options.pid)):
        taker = next((name for name, handler in handlers.items() if getattr(handler, key)), "")
        if mode == cri.NODE and taker:
            return taker
    return ""


def marked(config: cri.PodSandboxConfig, asked: str) -> cri.PodSandboxConfig:
    """Return a copy of a sandbox's configuration that remembers the handler asked for."""
    copy = cri.PodSandboxConfig()
    copy.CopyFrom(config)
    copy.annotations[HANDLER_ANNOTATION] = asked
    return copy


def unmark(sandbox: _Shown, handlers: Mapping[str, HandlerConfig]) -> _Shown:
    """Make a delegate's message ours, in place: the handler is the one asked for, the annotation is gone.

    `handlers` are those of this delegate. A sandbox without the mark was made by somebody else, such as kubelet before
    it was given vmrt: its handler is the one of ours that means the delegate's, or the delegate's own name for it.
    """
    theirs = sandbox.runtime_handler
    if HANDLER_ANNOTATION in sandbox.annotations:
        sandbox.runtime_handler = sandbox.annotations.pop(HANDLER_ANNOTATION)
    elif theirs:
        sandbox.runtime_handler = next(
            (name for name, handler in handlers.items() if handler.delegate_handler == theirs), theirs
        )
    return sandbox


def unmark_stats(stats: cri.PodSandboxStats) -> cri.PodSandboxStats:
    """Take our annotation away from statistics, in place."""
    stats.attributes.annotations.pop(HANDLER_ANNOTATION, None)
    return stats


def same_pod(one: cri.PodSandboxMetadata, other: cri.PodSandboxMetadata) -> bool:
    """Say whether two sandboxes are of one pod; attempts differ from restart to restart."""
    return bool(one.uid) and (one.uid, one.namespace, one.name) == (other.uid, other.namespace, other.name)


def check_sandbox(config: cri.PodSandboxConfig, features: cri.RuntimeHandlerFeatures, name: str) -> None:
    """Refuse what an older delegate would not refuse but overlook, since it does not know the field."""
    options = config.linux.security_context.namespace_options.userns_options
    if options.mode == cri.POD and (options.uids or options.gids) and not features.user_namespaces:
        unsupported(
            "config.linux.security_context.namespace_options.userns_options",
            f"asks for a user namespace, which the delegate {name} does not offer",
        )


def check_container(
    config: cri.ContainerConfig, features: cri.RuntimeHandlerFeatures, runtime: cri.RuntimeFeatures, name: str
) -> None:
    """Refuse what an older delegate would overlook: a container must not get more than was asked for."""
    for index, mount in enumerate(config.mounts):
        if mount.recursive_read_only and not features.recursive_read_only_mounts:
            unsupported(
                f"RROUnsupported: config.mounts[{index}].recursive_read_only",
                f"is set, and the delegate {name} has no recursive read-only mounts",
            )
    if (
        config.linux.security_context.supplemental_groups_policy == cri.Strict
        and not runtime.supplemental_groups_policy
    ):
        unsupported(
            "config.linux.security_context.supplemental_groups_policy",
            f"is Strict, which the delegate {name} does not offer",
        )
