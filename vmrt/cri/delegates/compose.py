"""Puts our services and the delegates together; without delegates ours are given back as they are."""

from __future__ import annotations

from dataclasses import dataclass

from vmrt.config import Config
from vmrt.cri.delegates.control import MergedControl
from vmrt.cri.delegates.directory import Directory
from vmrt.cri.delegates.images import MergedImages, Provider
from vmrt.cri.delegates.runtime import MergedRuntime
from vmrt.cri.ports import Pods
from vmrt.pods.drivers import ImageStore
from vmrt.proto.runtime.v1 import api_pb2_grpc as cri_grpc
from vmrt.proto.vmrt.v1 import control_pb2_grpc as control_grpc


@dataclass(frozen=True, slots=True)
class Services:
    """What is to be served; `directory` is to be opened before and closed after, None without delegates."""

    runtime: cri_grpc.RuntimeServiceServicer
    image: cri_grpc.ImageServiceServicer
    control: control_grpc.ControlServicer
    directory: Directory | None = None


def compose(
    config: Config,
    pods: Pods,
    images: ImageStore,
    runtime: cri_grpc.RuntimeServiceServicer,
    image: cri_grpc.ImageServiceServicer,
    control: control_grpc.ControlServicer,
) -> Services:
    """Wrap our three services where delegates are configured."""
    if not config.delegates:
        return Services(runtime, image, control)
    directory = Directory(config.handlers, pods)
    provider = Provider(images, directory)
    return Services(
        MergedRuntime(runtime, directory, provider),
        MergedImages(image, directory, provider),
        MergedControl(control, directory),
        directory,
    )
