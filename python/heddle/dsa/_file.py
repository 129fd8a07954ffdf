"""The file of an indexer: safetensors, with one metadata entry "heddle.indexer" of JSON.

Tensors "<layer>.<parameter>" in float32; the JSON has the version, the sizes, the layers, and what is known of them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save as to_bytes

import heddle
from heddle._errors import HeddleError, HeddleValueError, refuse
from heddle.dsa._indexer import Indexer, LayerIndexer

VERSION = 1
_KEY = "heddle.indexer"
_SIZES = ("hidden_size", "heads", "dim", "rope_dim")


def save(indexer: Indexer, path: str | Path) -> None:
    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise _refuse(f"{path}: the directory does not exist")
    header = {"version": VERSION, **{name: getattr(indexer, name) for name in _SIZES}}
    header |= {"layers": sorted(indexer.layers), "about": indexer.about, "heddle": heddle.__version__}
    tensors = {
        f"{layer}.{name}": tensor.detach().float().contiguous()
        for layer, module in indexer.layers.items()
        for name, tensor in module.state_dict().items()
    }
    part = path.with_name(path.name + ".part")
    part.write_bytes(to_bytes(tensors, {_KEY: json.dumps(header)}))
    os.replace(part, path)


def load(path: str | Path) -> Indexer:
    """Reads an indexer that Indexer.save() wrote.

    Raises HeddleValueError, argument "path", for a file that is not there, is truncated, is no indexer, has another
    version, or holds tensors of other names, shapes or dtypes than it says.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = _header(path, file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except HeddleError:
        raise
    except FileNotFoundError:
        raise _refuse(f"{path} does not exist") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise _refuse(f"{path} is truncated or no safetensors file: {error}") from None

    layers, expected = {}, 0
    for layer in header["layers"]:
        module = LayerIndexer(*(header[name] for name in _SIZES))
        state = {}
        for name, like in module.state_dict().items():
            tensor = tensors.get(f"{layer}.{name}")
            if tensor is None:
                raise _refuse(f"{path} is damaged: it lacks the tensor {layer}.{name}")
            if tensor.shape != like.shape or tensor.dtype != torch.float32:
                came = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
                raise _refuse(f"{path}: {layer}.{name} is {came}; allowed is float32 {list(like.shape)}")
            if not tensor.isfinite().all():
                raise _refuse(f"{path}: {layer}.{name} has values that are not finite")
            state[name] = tensor
        module.load_state_dict(state)
        layers[layer] = module.eval().requires_grad_(False)
        expected += len(state)
    if len(tensors) != expected:
        raise _refuse(f"{path} is damaged: {len(tensors)} tensors, {expected} for the layers that it names")
    return Indexer(*(header[name] for name in _SIZES), layers, header["about"])


def _header(path: str | Path, metadata: dict[str, str]) -> dict[str, Any]:
    if _KEY not in metadata:
        raise _refuse(f"{path} is no indexer: a safetensors file without {_KEY!r}")
    try:
        header = json.loads(metadata[_KEY])
        version = header["version"]
    except (ValueError, KeyError, TypeError):
        raise _refuse(f"{path} is damaged: {_KEY!r} cannot be read") from None
    if version != VERSION:
        raise _refuse(f"{path} is an indexer of version {version}; allowed is {VERSION}")
    numbers = [header.get(name) for name in _SIZES] + list(header.get("layers") or [None])
    if not all(isinstance(n, int) and n >= 0 for n in numbers) or "about" not in header or 0 in numbers[:3]:
        raise _refuse(f"{path} is damaged: {_KEY!r} lacks sizes or layers")
    if header["rope_dim"] % 2 or header["rope_dim"] > header["dim"]:
        raise _refuse(f"{path} is damaged: rope_dim is {header['rope_dim']} of {header['dim']}")
    return header


def _refuse(message: str) -> HeddleError:
    return refuse(HeddleValueError, "value", "path", message)
