"""The tensors of a model folder: known from the files' headers, read when they are wanted.

A tensor of ours is made of pieces of stored ones: mostly one whole tensor, here and there rows of
one (a query, key and value map stored as one) or many side by side (experts stored one by one).
Each is read on its own, straight into the number format wanted, so that weights are never held
twice. Files are safetensors, never pickles.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from blockdiff.errors import InputError, first_line

WEIGHTS = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
# A file is mapped into memory, and what was read of it stays there until it is closed.
_MAPPED = 2**27


class Stored(NamedTuple):
    """Where a tensor is, and what its file's header says of it."""

    path: Path
    shape: list[int]
    kind: str


class Piece(NamedTuple):
    """A stored tensor, or some of its rows, and the part of ours that it fills."""

    name: str
    rows: slice = slice(None)
    into: tuple[int | slice, ...] = ()


Files = dict[str, Stored]
Pieces = Mapping[str, list[Piece]]


@dataclass
class Reader:
    """Stored tensors by name, with no more than one file open, and that not for long."""

    files: Mapping[str, Stored]

    def __post_init__(self) -> None:
        self._open: tuple[Path, Any, Any] | None = None
        self._read = 0

    def __call__(self, name: str, rows: slice = slice(None)) -> Tensor:
        path, shape, _ = self.files[name]
        size = 4 * torch.Size(shape).numel()
        if self._open is not None and (self._open[0] != path or self._read + size > _MAPPED):
            self.close()
        if self._open is None:
            context = opened(path)
            self._open = path, context, context.__enter__()
        file = self._open[2]
        whole = rows == slice(None)
        tensor: Tensor = file.get_tensor(name) if whole else file.get_slice(name)[rows]
        self._read += size
        return tensor

    def close(self) -> None:
        if self._open is not None:
            self._open[1].__exit__(None, None, None)
        self._open, self._read = None, 0


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {first_line(error)}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} does not hold a JSON object")
    return found


def find_tensors(folder: Path) -> Files:
    """The tensors of a folder, by name, from the files' headers alone.

    What is opened is model.safetensors, else the files model.safetensors.index.json names; others
    that lie beside them are no part of the model.
    """
    index = folder / f"{WEIGHTS}.index.json"
    if (folder / WEIGHTS).is_file():
        names = {WEIGHTS}
    elif index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(x, str) for x in shards.values()):
            raise InputError(f"{index} holds no weight_map from names to files")
        names = set(shards.values())
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise InputError(f"{index} names {name!r}, which is not in {folder}")
    else:
        pickled = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
        if pickled:
            raise InputError(
                f"{folder} has pickled weights only ({pickled[0]}), which can run code when "
                "opened; convert them to model.safetensors"
            )
        raise InputError(f"{folder} has no {WEIGHTS}")
    found: Files = {}
    for name in sorted(names):
        path = folder / name
        with opened(path, "numpy") as file:  # torch cannot map what is larger than memory
            for key in file.keys():  # noqa: SIM118
                header = file.get_slice(key)
                found[key] = Stored(path, list(header.get_shape()), header.get_dtype())
    return found


@contextmanager
def opened(path: Path, framework: str = "pt") -> Iterator[Any]:
    """A safetensors file; what can be wrong with it in one line."""
    try:
        path.open("rb").close()  # safetensors calls every failure a missing file
        with safe_open(path, framework=framework) as file:
            yield file
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "mmap" not in str(error):
            raise
        raise InputError(f"cannot read {path}: {first_line(error)}") from None
    except SafetensorError as error:
        raise InputError(
            f"{path} is truncated or no safetensors file ({error}); fetch or save it again"
        ) from None


def stored_dtype(files: Mapping[str, Stored]) -> torch.dtype:
    """The number format most of the stored numbers are in."""
    count: Counter[str] = Counter()
    for tensor in files.values():
        count[tensor.kind] += torch.Size(tensor.shape).numel()
    known = [kind for kind, _ in count.most_common() if kind in _DTYPES]
    return _DTYPES[known[0]] if known else torch.float32


def free_memory(devices: Sequence[torch.device]) -> int:
    """Bytes that are free on devices, together."""
    return sum(
        torch.cuda.mem_get_info(device)[0]
        if device.type == "cuda"
        else int(psutil.virtual_memory().available)
        for device in devices
    )


def require_memory(
    numbers: int,
    dtype: torch.dtype,
    folder: Path,
    devices: Sequence[torch.device] = (torch.device("cpu"),),
) -> None:
    """Raises `InputError` where so many numbers of a model do not fit into free memory."""
    free = free_memory(devices)
    if numbers * dtype.itemsize <= free:
        return
    size = {kind: numbers * kind.itemsize / 1e9 for kind in (dtype, torch.bfloat16)}
    hint = "a smaller model or a machine with more is needed"
    if numbers * 2 <= free < numbers * dtype.itemsize:
        hint = f"in bf16 they take {size[torch.bfloat16]:.1f}: give `dtype` bf16"
    raise InputError(
        f"{folder}: the weights take {size[dtype]:.1f} GB in {str(dtype).removeprefix('torch.')} "
        f"and {free / 1e9:.1f} GB of memory are free; {hint}"
    )


def check_pieces(
    expected: Mapping[str, Tensor], pieces: Pieces, files: Mapping[str, Stored], folder: Path
) -> None:
    """Raises `InputError` unless the pieces make up the tensors that a network expects."""
    missing = sorted(expected.keys() - pieces.keys())
    unknown = sorted(pieces.keys() - expected.keys())
    if missing or unknown:
        what = f"{missing[0]} is missing" if missing else f"{unknown[0]} belongs to no layer"
        count = len(missing) + len(unknown)
        raise InputError(
            f"{folder}: the weights do not fit config.json: {what} ({count} such names in all)"
        )
    for name, own in pieces.items():
        target, filled = torch.empty(expected[name].shape, device="meta"), 0
        for piece in own:
            source = torch.empty(files[piece.name].shape, device="meta")
            try:
                part = target[piece.into] if piece.into else target
                rows = source if piece.rows == slice(None) else source[piece.rows]
            except IndexError:
                part, rows = torch.empty(0), source
            if part.shape != rows.shape:
                raise InputError(
                    f"{folder}: {piece.name} has shape {list(rows.shape)} but config.json asks for "
                    f"{list(part.shape)}"
                )
            filled += rows.numel()
        if filled != target.numel():
            raise InputError(f"{folder}: the weights do not fit config.json: {name} is incomplete")


@torch.no_grad()
def fill(
    network: nn.Module,
    pieces: Pieces,
    files: Mapping[str, Stored],
    dtype: torch.dtype,
    folder: Path,
    device_of: Callable[[str], torch.device],
) -> None:
    """Gives a network that was made without memory its tensors, one after the other.

    A buffer keeps the network's own number format, a parameter gets `dtype`. Raises `InputError`
    for numbers that are not finite.
    """
    read = Reader(files)
    buffers = {name: buffer.dtype for name, buffer in network.named_buffers()}
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    made: dict[str, Tensor] = {}
    try:
        for name in sorted(pieces, key=lambda name: (files[pieces[name][0].name].path, name)):
            kind, device = buffers.get(name, dtype), device_of(name)
            whole = len(pieces[name]) == 1 and not pieces[name][0].into
            out = None if whole else torch.empty(shapes[name], dtype=kind, device=device)
            for piece in pieces[name]:
                part = read(piece.name, piece.rows)
                if part.numel() and not all(bool(x.isfinite()) for x in part.aminmax()):
                    raise InputError(
                        f"{folder}: {piece.name} holds numbers that are not finite: the training "
                        "that made it diverged; use an earlier checkpoint"
                    )
                if out is not None:
                    out[piece.into].copy_(part)
                    continue
                out = part.to(device=device, dtype=kind)
                if piece.rows != slice(None):
                    out = out.contiguous()
            assert out is not None
            made[name] = out
            del part
    finally:
        read.close()
    network.load_state_dict(made, assign=True, strict=False)
    network.requires_grad_(True)
