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
    task-local. A cache that a pruned pass has filled is refused within; one that is filled within
    is a dense one, in which pruned passes take all there is for text: do not go on from it.
    """
    token = UNPRUNED.set(True)
    try:
        yield
    finally:
        UNPRUNED.reset(token)
