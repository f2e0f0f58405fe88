"""Head masks as files: find, load, download, save. Knows nothing of plans, models or inputs.

A mask file is what the released code reads: `headmask_<size>_<num>.npy`, (layers, heads), True
where the head keeps reading visual tokens; `num` is about how many heads of a layer are kept.
"""

from __future__ import annotations

import hashlib
import logging
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import constants, try_to_load_from_cache

from yopo.files import write_whole
from yopo.plan.value_checks import as_mask

logger = logging.getLogger(__name__)

UPSTREAM = "https://raw.githubusercontent.com/ZhangAIPI/YOPO_MLLM_Pruning/main/LLaVA/headmask"

# SHA-256 of the masks published upstream (ZhangAIPI/YOPO_MLLM_Pruning, LLaVA/headmask/).
SHA256 = {
    "headmask_13b_10.npy": "1b60d00bee9f39428f5b5b767197d4b7347595a0072507ebd4e9f4f7ba5f973e",
    "headmask_13b_20.npy": "31b758111df2bd7abefcef406b35c3dc514948eb872342301210dbfa485633be",
    "headmask_13b_30.npy": "8e820ebd5c1f72624fb3e7a47c292970bc0feac9c8c2f5c36da9f1ef85c576a6",
    "headmask_13b_5.npy": "5c5a65e82fc3f191df76ea894a64f69d61eb01e7e03d129002c922dfc8045f7f",
    "headmask_7b_16.npy": "6c65c78107a6dcb61004d96307ec18332c82cba288d804effbfc43ca6cd69c9e",
    "headmask_7b_24.npy": "55065a9083bd01c96552f0768efc4107dcac450c23c8b78684c5edae00161462",
    "headmask_7b_8.npy": "b9a0e683c6ba78ea13923794555ae16ab4686537caa9dc23d3d8cdb09cc0ce54",
}

# (layers, heads) of the models whose masks the released code names by size.
SIZES = {(32, 32): "7b", (40, 40): "13b"}


def load(path: str | Path) -> torch.Tensor:
    """The (layers, heads) bool mask stored in the .npy file `path`.

    Raises FileNotFoundError, or ValueError when the file is no readable array of 0/1.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is not a readable .npy head mask ({error}); replace it with a file that "
            f"yopo.plan.head_mask.save wrote or a published one"
        ) from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise ValueError(f"{path} is an .npz archive; a head mask is a single .npy array")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{path} holds dtype {array.dtype}; a head mask is bool or 0/1 numbers")
    return as_mask(str(path), array)


def save(path: str | Path, head_keep: object) -> Path:
    """Write `head_keep` (L, H) as a bool .npy file, replacing `path` in one step; returns it."""
    path = Path(path)
    if path.suffix != ".npy":
        raise ValueError(f"a head mask file ends in .npy; got {path}")
    mask = as_mask("head_keep", head_keep).numpy()
    with write_whole(path) as partial, open(partial, "wb") as file:
        np.save(file, mask)
    return path


def find(
    num: int,
    num_layers: int,
    num_heads: int,
    checkpoint: str | Path | None = None,
    revision: str | None = None,
) -> torch.Tensor:
    """The (num_layers, num_heads) mask that `headcut_num = num` names.

    Looks in the checkpoint (a local folder or a Hub id in the Hub's cache, at `revision`) and its
    `headmask/`, $YOPO_HEADMASK_DIR, ./headmask and the cache; then downloads a published mask.
    Raises FileNotFoundError listing where it looked and what to do, ValueError for a file that is
    there but wrong (another shape, not a mask, another SHA-256 than the published one).
    """
    size = SIZES.get((num_layers, num_heads))
    name = f"headmask_{size or '*'}_{num}.npy"
    notes: list[str] = []
    for label, folder in _folders(checkpoint, revision):
        mask = _in_folder(folder, name, (num_layers, num_heads), notes)
        if mask is not None:
            return mask
        notes.append(f"{label}: {folder}" + ("" if folder.is_dir() else " (no such folder)"))
    if name not in SHA256:
        notes.append("upstream: no mask of that name is published")
    elif _offline():
        notes.append("upstream: not asked, HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set")
    else:
        try:
            return _checked(_download(name), (num_layers, num_heads))
        except OSError as error:
            notes.append(f"upstream: {error}")
    raise FileNotFoundError(
        f"no head mask {name} for {num_layers} layers x {num_heads} heads (headcut_num = {num}). "
        "Looked in:\n  " + "\n  ".join(notes) + "\n"
        "Remedies: put the file into ./headmask or the checkpoint folder; set YOPO_HEADMASK_DIR to "
        "the folder that has it; allow the network, for a published mask; or store a whole plan in "
        "the config (yopo.PruningPlan(...).save_to(config))."
    )


def cache_folder() -> Path:
    """Where downloaded masks are kept."""
    return Path(constants.HF_HOME) / "yopo" / "headmask"


def _folders(checkpoint: str | Path | None, revision: str | None) -> Iterator[tuple[str, Path]]:
    if checkpoint:
        folder = Path(checkpoint).expanduser()
        if not folder.is_dir():
            folder = _hub_snapshot(str(checkpoint), revision) or folder
        yield "checkpoint", folder
        yield "checkpoint", folder / "headmask"
    if os.environ.get("YOPO_HEADMASK_DIR"):
        yield "YOPO_HEADMASK_DIR", Path(os.environ["YOPO_HEADMASK_DIR"]).expanduser()
    yield "working directory", Path.cwd() / "headmask"
    yield "cache", cache_folder()


def _hub_snapshot(repo_id: str, revision: str | None) -> Path | None:
    """The folder of a Hub repository in the Hub's cache: where its config.json was read from."""
    try:
        config = try_to_load_from_cache(repo_id, "config.json", revision=revision)
    except ValueError:  # not a Hub id, but the path of a folder that is not here
        return None
    return Path(config).parent if isinstance(config, str) else None


def _in_folder(
    folder: Path, name: str, shape: tuple[int, int], notes: list[str]
) -> torch.Tensor | None:
    """The mask called `name` in `folder`, or None; what is passed over is told in `notes`.

    Where the name is a pattern (a model of no released size), the first file of this shape counts.
    """
    if "*" not in name:
        path = folder / name
        return _checked(path, shape) if path.is_file() else None
    fitting: dict[Path, torch.Tensor] = {}
    for path in sorted(folder.glob(name)):
        mask = load(path)
        if tuple(mask.shape) == shape:
            fitting[path] = mask
        else:
            notes.append(f"passed over: {path}, shape {tuple(mask.shape)}, wanted {shape}")
    masks = list(fitting.values())
    if any(not torch.equal(mask, masks[0]) for mask in masks):
        raise ValueError(
            f"several head masks in {folder} have shape {shape} and differ: "
            f"{', '.join(path.name for path in fitting)}; leave one"
        )
    return masks[0] if masks else None


def _checked(path: Path, shape: tuple[int, int]) -> torch.Tensor:
    # Only what lies in the cache claims to be the published file; elsewhere it may be one's own.
    if path.parent == cache_folder() and path.name in SHA256:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != SHA256[path.name]:
            raise ValueError(
                f"{path} has SHA-256 {digest}, the published mask has {SHA256[path.name]}; delete "
                "the file to have it downloaded again"
            )
    mask = load(path)
    if tuple(mask.shape) != shape:
        raise ValueError(
            f"{path} has shape {tuple(mask.shape)}, the model has (layers, heads) = {shape}; "
            "replace it with the mask of this model"
        )
    return mask


def _offline() -> bool:
    # The Hub reads its flags at import; ours are read now, for those who set them later.
    flags = (os.environ.get(flag, "") for flag in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return constants.HF_HUB_OFFLINE or any(f.upper() in {"1", "ON", "YES", "TRUE"} for f in flags)


def _download(name: str) -> Path:
    """Fetch a published mask into the cache (a file of its own, then renamed) and return its path.

    Raises ValueError on a wrong SHA-256, OSError when it cannot be fetched or written.
    """
    url = f"{os.environ.get('YOPO_HEADMASK_URL', UPSTREAM).rstrip('/')}/{name}"
    path = cache_folder() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    logger.info("downloading the published head mask %s", url)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=SHA256[name], progress=False)
    except RuntimeError as error:  # torch.hub's word for a wrong hash; it removed the file
        raise ValueError(
            f"{url} is not the published head mask: {error}; nothing was kept. Check "
            "YOPO_HEADMASK_URL and the network's proxies, or put the right file into ./headmask"
        ) from error
    except OSError as error:
        raise OSError(f"{url} could not be fetched into {path}: {error}") from error
    return path
