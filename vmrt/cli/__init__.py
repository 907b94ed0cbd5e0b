"""The vmrt command line, one module per command group."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

# What `vmrt serve` runs, put here by the composition root (`vmrt.__main__`), which nothing may import.
daemon: Callable[..., Coroutine[Any, Any, None]] | None = None
# What `vmrt doctor` asks whether a guest really boots under KVM, put here likewise: given the `Config`, the reason why
# not, "" when it does.
kvm_failure: Callable[..., Coroutine[Any, Any, str]] | None = None
