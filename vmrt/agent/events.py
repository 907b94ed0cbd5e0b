"""Exits and OOM kills, numbered from 1; the last 1024 are kept for a daemon that was away."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque

from vmrt.agent import agent_pb2 as pb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmrt.agent.process import Exit

KEPT = 1024


class Subscriber:
    """One EventStream; `wake_fd` becomes readable when there may be more."""

    def __init__(self, after: int) -> None:
        self.after = after
        self.wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


class Events:
    """The numbered record of events."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: deque[tuple[int, str, Exit | None]] = deque(maxlen=KEPT)
        self._subscribers: list[Subscriber] = []
        self.last = 0

    def exited(self, container_id: str, exit_: Exit, *, oom_killed: bool) -> None:
        """Record the end of a container's main process."""
        exit_.oom_killed = oom_killed
        self._add(container_id, exit_)

    def out_of_memory(self, container_id: str) -> None:
        """Record that the kernel killed a process of this container for memory."""
        self._add(container_id, None)

    def _add(self, container_id: str, exit_: Exit | None) -> None:
        with self._lock:
            self.last += 1
            self._kept.append((self.last, container_id, exit_))
            for subscriber in self._subscribers:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_write(subscriber.wake_fd, 1)

    def subscribe(self, after: int) -> Subscriber:
        """Start a reader of the events behind number `after`. Raises `ValueError` for a number not given yet."""
        with self._lock:
            if after > self.last:
                raise ValueError(f"event {after} has not happened; the last one is {self.last}")
            subscriber = Subscriber(after)
            self._subscribers.append(subscriber)
            return subscriber

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """End a reader."""
        with self._lock:
            self._subscribers.remove(subscriber)
            os.close(subscriber.wake_fd)

    def next(self, subscriber: Subscriber) -> pb.Event | None:
        """Return the reader's next event, None when there is none now."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(subscriber.wake_fd)
        with self._lock:
            if subscriber.after >= self.last:
                return None
            oldest = self._kept[0][0]
            sequence, container_id, exit_ = self._kept[max(0, subscriber.after + 1 - oldest)]
        subscriber.after = sequence
        event = pb.Event(sequence=sequence)
        if exit_ is None:
            event.oom.container_id = container_id
        else:
            event.exit.container_id = container_id
            event.exit.exit.CopyFrom(exit_.frame())
        return event
