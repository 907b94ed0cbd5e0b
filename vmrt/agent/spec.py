"""What the agent adds to the OCI specification that the host made. Pure functions."""

from __future__ import annotations

from vmrt.agent import layout, status

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmrt.agent.users import Identity


def parse(text: bytes) -> dict[str, Any]:
    """Return the specification. Raises `AgentError` unless it is an object with `process` and `linux` objects."""
    import json

    try:
        spec = json.loads(text)
    except ValueError as e:
        raise status.AgentError(status.INVALID_ARGUMENT, f"oci_spec is no JSON: {e}") from e
    if not isinstance(spec, dict):
        raise status.AgentError(status.INVALID_ARGUMENT, "oci_spec is no JSON object")
    for key in ("process", "linux"):
        if not isinstance(spec.get(key), dict):
            raise status.AgentError(status.INVALID_ARGUMENT, f"oci_spec.{key} is no JSON object")
    process = spec["process"]
    if not isinstance(process.get("args"), list) or not process["args"]:
        raise status.AgentError(status.INVALID_ARGUMENT, "oci_spec.process.args is empty")
    if not isinstance(process.get("cwd"), str) or not isinstance(process.get("env", []), list):
        raise status.AgentError(status.INVALID_ARGUMENT, "oci_spec.process needs a string cwd and a list env")
    return spec


def complete(
    spec: dict[str, Any], *, root_path: str, identity: Identity, cgroups_path: str, target_pid: int
) -> dict[str, Any]:
    """Return the specification that crun gets; `target_pid` is the container to share a PID namespace with, or 0."""
    # Copied as far as it is changed: deepcopy would take an emulated guest longer than all of the rest.
    root, process, linux = spec.get("root"), dict(spec["process"]), dict(spec["linux"])
    process["user"] = {
        **process.get("user", {}),
        "uid": identity.uid,
        "gid": identity.gid,
        "additionalGids": list(identity.groups),
    }
    process["env"] = env = list(process.get("env", []))
    if not any(str(line).startswith("HOME=") for line in env):
        env.append(f"HOME={identity.home or '/'}")
    linux["cgroupsPath"] = cgroups_path
    linux["namespaces"] = [dict(namespace) for namespace in linux.get("namespaces", [])]
    for namespace in linux["namespaces"]:
        if namespace.get("path") == layout.TARGET_PID_NAMESPACE:
            if not target_pid:
                raise status.AgentError(
                    status.INVALID_ARGUMENT, "the PID namespace of a target is asked for, but no target is named"
                )
            namespace["path"] = f"/proc/{target_pid}/ns/pid"
    done = {**spec, "process": process, "linux": linux}
    done["root"] = {**(root if isinstance(root, dict) else {}), "path": root_path}
    return done
