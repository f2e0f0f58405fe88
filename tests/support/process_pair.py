"""Two processes joined by gloo that stay for many tests: to start one takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

COUNT = 2
# One process that waits for the other in vain says so after this long, instead of never.
PATIENCE = timedelta(minutes=5)


class Processes:
    """Runs functions in both at once. After one failed they are started anew: the other may wait
    for it for ever."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._starts = 0
        self._running: list[tuple[Any, Connection]] = []

    def run(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """What `work(rank, *args)` returned in each process. Raises AssertionError with the
        traceback of the first one that failed."""
        if not self._running:
            self._start()
        for _, pipe in self._running:
            pipe.send((work, args))
        results: dict[Any, Any] = {}
        pipes = [pipe for _, pipe in self._running]
        while len(results) < COUNT:
            for pipe in wait([pipe for pipe in pipes if pipe not in results]):
                try:
                    failed, results[pipe] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    failed, results[pipe] = True, "the process is gone"
                if failed:
                    self.stop()
                    raise AssertionError(f"process {pipes.index(pipe)}: {results[pipe]}")
        return [results[pipe] for pipe in pipes]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._starts += 1
        meeting = self._folder / f"meeting-{self._starts}"
        for rank in range(COUNT):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, str(meeting), theirs), daemon=True)
            process.start()
            theirs.close()
            self._running.append((process, mine))

    def stop(self) -> None:
        for process, pipe in self._running:
            pipe.close()
            process.kill()
            process.join()
        self._running = []


def _serve(rank: int, meeting: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(COUNT)}
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=COUNT, timeout=PATIENCE
    )
    while True:
        try:
            work, args = pipe.recv()
        except (EOFError, OSError):  # the tests are over
            return
        try:
            answer = False, work(rank, *args)
        except Exception:
            answer = True, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))  # not send: it shares tensors that go with us
