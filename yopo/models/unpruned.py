"""Dense passes of models that have a plan: `unpruned`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

UNPRUNED: ContextVar[bool] = ContextVar("yopo_unpruned", default=False)


@contextmanager
def unpruned() -> Iterator[None]:
    """Within the block models run as if they had no plan: stock's own forward, of the weights that
    they have, such as a teacher's pass in distillation. Nothing is changed or copied. Thread- and
    task-local. A cache that a pruned pass has filled is refused within, and one filled within by
    a pruned pass afterwards where it holds an image.
    """
    token = UNPRUNED.set(True)
    try:
        yield
    finally:
        UNPRUNED.reset(token)
