"""Looks at what modules give while a network computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]  # module, its inputs, its output


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """Every module calls its hook after each of its forward passes inside the `with`."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
