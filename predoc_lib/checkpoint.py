"""Weights and checkpoints on the disk: safetensors only, nothing is ever unpickled.

A checkpoint is one file, ``step-00000500.safetensors``: the tensors of a run's state by name, and in the header the
rest of the state as JSON with the SHA-256 of all of it.
"""

import collections
import contextlib
import hashlib
import json
import random
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from predoc_lib.files import whole

KEEP = 2  # checkpoints of a run: should the newest be damaged, there is one before


class WeightsError(ValueError):
    """Weights that cannot be used: the message names the file and what does not fit."""


class CheckpointError(ValueError):
    """Checkpoints that cannot be used: the message names the file or the field, and what to do."""


def save_weights(model: nn.Module, path: Path, dtype: torch.dtype | None = None) -> None:
    """Write a model's weights as safetensors, in ``dtype`` if given; the file appears whole or not at all."""
    weights = {k: v.detach().to(dtype or v.dtype).contiguous() for k, v in model.state_dict().items()}
    with whole(path) as temporary:
        safetensors.torch.save_file(_apart(weights), temporary)


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """Fill a model with the weights of a safetensors file (any floating type) and return it.

    Raises:
        WeightsError: the file is absent, damaged or of another model; it names the first weight that does not fit and
            both shapes.
    """
    try:
        weights = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(f"{path} cannot be read as safetensors weights: {error}.{_pickled(path)}") from error
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        expected, found = (list(w[name].shape) if name in w else "nothing" for w in (own, weights))
        if expected != found:
            raise WeightsError(
                f"{path} does not fit the model: it has {found} for {name!r}, the model {expected}. "
                "Build the model with the config in the metrics.json beside the weights."
            )
    model.load_state_dict({name: w.to(own[name].dtype) for name, w in weights.items()})
    return model


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write the checkpoint of a step, and delete all but the last two.

    Args:
        folder: ``checkpoints/`` of a run.
        step: it is in the file's name.
        state: nested dictionaries, lists and tuples of tensors, numbers, strings and None.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_pack(state, tensors, ""))
    tensors = _apart(tensors)
    path = folder / f"step-{step:08d}.safetensors"
    for left in folder.glob(".step-*"):  # of a process that was killed while it saved
        left.unlink(missing_ok=True)
    with whole(path) as temporary:
        metadata = {"state": text, "sha256": _checksum(text, tensors)}
        safetensors.torch.save_file(tensors, temporary, metadata=metadata)
    for old in paths(folder)[:-KEEP]:
        old.unlink(missing_ok=True)
    return path


def load(path: Path) -> dict[str, Any]:
    """The state in a checkpoint file, its tensors on the CPU.

    Raises:
        CheckpointError: it is absent, damaged, or not a checkpoint.
    """
    with _readable(path), safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata["sha256"] != _checksum(metadata["state"], tensors):
            raise CheckpointError(f"{path} is damaged: its content does not have the checksum that it names.")
        return _state(metadata, tensors)


def summary(path: Path) -> dict[str, Any]:
    """What a checkpoint holds beside its tensors, read from its header alone: "step", "steps", "history", ...

    Raises:
        CheckpointError: it is absent, damaged, or not a checkpoint.
    """
    with _readable(path), safetensors.safe_open(path, framework="pt") as file:
        return _state(file.metadata() or {}, collections.defaultdict(lambda: None))


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {error}.") from error
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:  # JSON of another kind
        raise CheckpointError(f"{path} cannot be read as a checkpoint: its header holds no state of a run.") from error


def _state(metadata: dict[str, str], tensors: Mapping[str, Tensor | None]) -> dict[str, Any]:
    found = _unpack(json.loads(metadata["state"]), tensors)
    if not isinstance(found, dict):
        raise TypeError(f"a {type(found).__name__}")
    return found


def newest(folder: Path) -> dict[str, Any] | None:
    """The state of the newest whole checkpoint in a folder; None if there is none at all.

    A damaged one is passed over with a warning.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    found = paths(folder)
    for path in reversed(found):
        try:
            return load(path)
        except CheckpointError as error:
            warnings.warn(f"{error} The checkpoint before it is used.", stacklevel=2)
    if found:
        raise CheckpointError(
            f"Every checkpoint in {folder} is damaged. Delete that folder to train again from the start."
        )
    return None


def paths(folder: Path) -> list[Path]:
    """The checkpoints in a folder by step; the clock of the machine plays no part in it."""
    return sorted(path for path in folder.glob("step-*.safetensors") if re.fullmatch(r"step-\d+", path.stem))


def must_be_same(mine: dict[str, Any], found: dict[str, Any], where: Path) -> None:
    """Compare what two runs are made of; ``device`` may differ, since a run may go on elsewhere.

    Raises:
        CheckpointError: it names the fields that differ, with both values.
    """
    absent = object()
    differing = [
        f"{name} is {found.get(name, 'absent')!r} there and {mine.get(name, 'absent')!r} here"
        for name in sorted(mine.keys() | found.keys())
        if name != "device" and mine.get(name, absent) != found.get(name, absent)
    ]
    if differing:
        raise CheckpointError(
            f"{where} holds another run: {'; '.join(differing)}. Use another folder, or the same parameters."
        )


def _pickled(path: Path) -> str:
    """A sentence, if a file is a pickle or PyTorch's archive of one."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        if file.read(2) in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK"):
            return " It looks like a pickle, and a pickle is never opened: it can run any code."
    return ""


def random_state() -> dict[str, Any]:
    """The state of this process's random generators: Python's, NumPy's, PyTorch's and that of its GPU."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what ``random_state`` gave."""
    name, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, none in the memory of another (as tied weights are), which safetensors refuses."""
    seen, apart = set(), {}
    for name, x in tensors.items():
        place = x.untyped_storage().data_ptr()
        apart[name] = x.clone() if place in seen else x
        seen.add(place)
    return apart


def _pack(tree: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """The tree as JSON can hold it; its tensors go into ``tensors``."""
    if isinstance(tree, Tensor):
        while name in tensors:  # as of {1: x, "1": y}
            name += "'"
        tensors[name] = tree.detach().cpu().contiguous()
        return {"$tensor": name}
    if isinstance(tree, dict):
        return {"$items": [[_pack(k, tensors, name), _pack(v, tensors, f"{name}/{k}")] for k, v in tree.items()]}
    if isinstance(tree, list | tuple):
        values = [_pack(value, tensors, f"{name}/{i}") for i, value in enumerate(tree)]
        return {"$tuple": values} if isinstance(tree, tuple) else values
    if tree is None or isinstance(tree, str | int | float):
        return tree
    raise CheckpointError(f"A checkpoint cannot hold {name[1:]!r}, a {type(tree).__name__}: tensors, numbers and text.")


def _unpack(tree: Any, tensors: Mapping[str, Tensor | None]) -> Any:
    if isinstance(tree, list):
        return [_unpack(value, tensors) for value in tree]
    if isinstance(tree, dict):
        (kind, content), *_ = tree.items()
        if kind == "$tensor":
            return tensors[content]
        if kind == "$tuple":
            return tuple(_unpack(value, tensors) for value in content)
        return {_unpack(key, tensors): _unpack(value, tensors) for key, value in content}
    return tree


def _checksum(text: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
