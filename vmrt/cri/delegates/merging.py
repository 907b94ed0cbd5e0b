"""How our answers and those of delegates become one. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from vmrt.cri.filters import has_labels
from vmrt.proto.runtime.v1 import api_pb2 as cri


def shows_sandbox(item: cri.PodSandbox, wanted: cri.PodSandboxFilter) -> bool:
    """Say whether a filter lets a sandbox through, as `vmrt.cri.filters` does for ours."""
    return (
        item.id.startswith(wanted.id)
        and (not wanted.HasField("state") or item.state == wanted.state.state)
        and has_labels(item.labels, dict(wanted.label_selector))
    )


def shows_container(item: cri.Container, wanted: cri.ContainerFilter) -> bool:
    """Say whether a filter lets a container through."""
    return (
        item.id.startswith(wanted.id)
        and item.pod_sandbox_id.startswith(wanted.pod_sandbox_id)
        and (not wanted.HasField("state") or item.state == wanted.state.state)
        and has_labels(item.labels, dict(wanted.label_selector))
    )


def merged_images(ours: Iterable[cri.Image], theirs: Iterable[cri.Image]) -> list[cri.Image]:
    """Return one entry for each id, ours first; one that several have carries all names, and the size it has here."""
    found: dict[str, cri.Image] = {}
    for image in (*ours, *theirs):
        known = found.get(image.id)
        if known is None:
            found[image.id] = image
            continue
        both = cri.Image()
        both.CopyFrom(known)
        both.repo_tags.extend(tag for tag in image.repo_tags if tag not in known.repo_tags)
        both.repo_digests.extend(digest for digest in image.repo_digests if digest not in known.repo_digests)
        both.pinned = known.pinned or image.pinned
        found[image.id] = both
    return list(found.values())


def named_image(images: Iterable[cri.Image], reference: str) -> cri.Image | None:
    """Return the image that has this id (or a prefix of 12 and more digits), tag or digest."""
    bare = reference.removeprefix("sha256:")
    for image in images:
        if reference == image.id or reference in image.repo_tags or reference in image.repo_digests:
            return image
        if len(bare) >= 12 and image.id.removeprefix("sha256:").startswith(bare):
            return image
    return None


def merged_usage(
    ours: Sequence[cri.FilesystemUsage], theirs: Iterable[cri.FilesystemUsage], devices: Mapping[str, int]
) -> list[cri.FilesystemUsage]:
    """Add up what lies on one file system, since kubelet looks at the first entry only; others follow.

    `devices` tells the device number of each mount point that could be looked at.
    """
    merged = []
    for usage in ours:
        copy = cri.FilesystemUsage()
        copy.CopyFrom(usage)
        merged.append(copy)
    for usage in theirs:
        device = devices.get(usage.fs_id.mountpoint)
        same = next((u for u in merged if device is not None and devices.get(u.fs_id.mountpoint) == device), None)
        if same is None:
            merged.append(usage)
            continue
        same.used_bytes.value += usage.used_bytes.value
        same.inodes_used.value += usage.inodes_used.value
    return merged


def merged_descriptors(
    ours: Sequence[cri.MetricDescriptor], theirs: Iterable[cri.MetricDescriptor]
) -> list[cri.MetricDescriptor]:
    """Return ours, and of theirs those that have another name."""
    names = {descriptor.name for descriptor in ours}
    return [*ours, *(descriptor for descriptor in theirs if descriptor.name not in names)]


def fitting_metrics(
    ours: Sequence[cri.MetricDescriptor],
    theirs: Iterable[cri.MetricDescriptor],
    metrics: Iterable[cri.PodSandboxMetrics],
) -> Iterator[cri.PodSandboxMetrics]:
    """Yield a delegate's metrics without those whose labels would be read by another descriptor than their own."""
    labels = {descriptor.name: list(descriptor.label_keys) for descriptor in ours}
    foreign = {d.name for d in theirs if d.name in labels and labels[d.name] != list(d.label_keys)}
    for pod in metrics:
        if foreign:
            _keep(pod.metrics, foreign)
            for container in pod.container_metrics:
                _keep(container.metrics, foreign)
        yield pod


def _keep(metrics: object, foreign: set[str]) -> None:
    kept = [metric for metric in metrics if metric.name not in foreign]  # type: ignore[attr-defined]
    del metrics[:]  # type: ignore[attr-defined]
    metrics.extend(kept)  # type: ignore[attr-defined]
