"""Work that processes share which torch.distributed joined (`accelerate launch`, `torchrun`): each
does its part of a list and gets all that came out, in the list's order, so that what is made of it
is the same to the bit as in one process. Knows nothing of models and samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from typing import Any, TypeVar

import torch.distributed as dist

Item = TypeVar("Item")
Result = TypeVar("Result")

_SHARED: ContextVar[bool] = ContextVar("yopo_shared", default=False)


@contextmanager
def shared(wanted: bool = True) -> Iterator[None]:
    """Within the block work is shared; every process has to come by, and with the same work.

    Raises ValueError where there are no processes to share it with."""
    if wanted and not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "distributed=True, but torch.distributed joins no processes: start them by `accelerate "
            "launch` or `torchrun` and call torch.distributed.init_process_group, or leave it out"
        )
    token = _SHARED.set(wanted)
    try:
        yield
    finally:
        _SHARED.reset(token)


def count() -> int:
    return dist.get_world_size() if _SHARED.get() else 1


def is_first() -> bool:
    """Whether this process is the one that writes and speaks; alone, it is."""
    return not _SHARED.get() or dist.get_rank() == 0


def in_turn(
    items: Iterable[Item],
    work: Callable[[int, Item], Result],
    mark: Callable[[Item], str] | None = None,
) -> Iterator[Result]:
    """What `work(number, item)` gives for each item, in order. An error of one is raised in all.
    mark: tells items apart, so that it shows if not all processes have the same.

    Raises ValueError, in all, where they have not, or not as many."""
    if count() == 1:
        for number, item in enumerate(items):
            yield work(number, item)
        return
    numbered, mine = iter(enumerate(items)), dist.get_rank()
    while True:
        some = list(islice(numbered, count()))
        marks = [str(_tried(mark, item)) if mark else str(number) for number, item in some]
        made = None if mine >= len(some) else _tried(work, *some[mine])
        rounds = _gathered((marks, made))
        if any(others != marks for others, _ in rounds):
            raise ValueError(
                "the processes do not have the same samples in the same order: give each of them "
                "all of them; which are whose is decided here"
            )
        for _, (result, error) in rounds[: len(some)]:
            if error is not None:
                raise error
            yield result
        if len(some) < count():
            return


def agree(what: str, value: Any) -> None:
    """Raises ValueError, in all processes, where `value` is not the same in each."""
    if count() > 1 and len(set(_gathered(repr(value)))) > 1:
        raise ValueError(f"the processes were called with other {what}: call each of them alike")


def by_first(work: Callable[[], Result]) -> Result:
    """What `work()` gives in the first process, in all."""
    if count() == 1:
        return work()
    (result, error), *_ = _gathered(_tried(work) if is_first() else None)
    if error is not None:
        raise error
    return result


def _tried(work: Callable[..., Any], *args: Any) -> tuple[Any, Exception | None]:
    try:
        return work(*args), None
    except Exception as error:
        return None, error


def _gathered(mine: Any) -> list[Any]:
    found: list[Any] = [None] * count()
    dist.all_gather_object(found, mine)
    return found
