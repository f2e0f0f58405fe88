"""Files read and written the one way that the whole library does it: JSON objects with an error
that names the file, and every file whole or not at all.

What stands in a file is not known here; a folder's files are yopo/checkpoint's.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL = re.compile(r"\.\d+\.\d+\.partial$")  # what `write_whole` adds to a file's name


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ValueError naming the file if it holds none, OSError where
    it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON, perhaps cut off: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON that people can read, whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with write_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` when the block ends, and is removed if it fails:
    `path` is the old file or the new one, never a part. Makes the folder if there is none.

    The path yielded ends in .partial: writers that go by a name's ending must be told the format.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process and thread in its name: two that write the same file do not meet.
    partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
