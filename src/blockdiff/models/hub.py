"""Opening and saving model folders: our own, and the paper's released checkpoints.

A released folder is recognised by its `config.json` and its weights are renamed; nothing after
`load_model` knows where a model came from. Weights are safetensors, never pickles.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerBase

from blockdiff.errors import InputError
from blockdiff.models.config import DiTConfig
from blockdiff.models.dit import DiT
from blockdiff.starter import packaged

WEIGHTS = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

# Released name → ours; the rest of each name is kept.
_RENAMES: tuple[tuple[str, str], ...] = (
    (r"^backbone\.", ""),
    (r"^vocab_embed\.embedding$", "embedding.weight"),
    (r"^sigma_map\.mlp\.0\.", "sigma.inner."),
    (r"^sigma_map\.mlp\.2\.", "sigma.outer."),
    (r"^blocks\.", "layers."),
    (r"\.norm1\.", ".norm_1."),
    (r"\.norm2\.", ".norm_2."),
    (r"\.attn_qkv\.", ".qkv."),
    (r"\.attn_out\.", ".attention_out."),
    (r"\.mlp\.0\.", ".mlp_in."),
    (r"\.mlp\.2\.", ".mlp_out."),
    (r"\.adaLN_modulation\.", ".modulation."),
    (r"^output_layer\.norm_final\.", "output.norm."),
    (r"^output_layer\.", "output."),
)
# Buffers that are no weights: RoPE's table is computed, the clip goes into the config.
_BUFFERS = ("rotary_emb.inv_freq", "sampling_eps_min", "sampling_eps_max")


def load_model(source: str | Path, *, dtype: torch.dtype = torch.float32) -> DiT:
    """The model in a folder or hub repository, in evaluation mode.

    Opens what `save_model` and `Trainer` wrote and the released BD3-LM layout (BD3-LM, MDLM,
    SEDD-backbone and AR kinds). Raises `InputError` when there is no such folder, no weights, only
    pickled weights, or weights that are truncated or do not fit the configuration.
    """
    folder = resolve(source)
    raw = _read_config(folder)
    weights = _read_weights(folder)
    if raw.get("model_type") == DiTConfig.model_type:
        config = _own_config(raw, folder)
    elif "hidden_dim" in raw and "n_blocks" in raw:
        config = released_config(raw, weights)
        weights = released_weights(weights)
    else:
        raise InputError(
            f"{folder}: model_type {raw.get('model_type')!r} is neither blockdiff nor a released "
            "BD3-LM, MDLM, SEDD or AR configuration"
        )
    model = _fill(DiT(config), weights, folder).eval()
    model.to(dtype=dtype)
    return model


def _own_config(raw: dict[str, Any], folder: Path) -> DiTConfig:
    try:
        return DiTConfig.from_dict(raw)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{folder}/config.json does not describe a model: {error}") from None


def released_config(raw: dict[str, Any], weights: dict[str, Tensor]) -> DiTConfig:
    """Our configuration for a released `config.json`; the clip is read from its buffers."""
    clip = [
        float(weights[name].flatten()[0])
        for key in ("sampling_eps_min", "sampling_eps_max")
        for name in (key, f"backbone.{key}")
        if name in weights
    ]
    two_stream = raw.get("cross_attn", True) and "block_size" in raw
    whole = not two_stream or raw["block_size"] == raw["model_length"]
    timed = raw.get("time_conditioning", False)
    return DiTConfig(
        vocab_size=raw["vocab_size"],
        length=raw["model_length"],
        block_size=raw["block_size"] if two_stream else raw["model_length"],
        hidden_size=raw["hidden_dim"],
        num_hidden_layers=raw["n_blocks"],
        num_attention_heads=raw["n_heads"],
        cond_size=raw.get("cond_dim", 128),
        dropout=raw.get("dropout", 0.1),
        causal=raw.get("causal", False),
        adaln=raw.get("adaln", True),
        time_conditioning=timed,
        score=timed and whole,  # of the released kinds SEDD alone is fed the time
        clip=(clip[0], clip[1]) if len(clip) == 2 else None,
    )


def released_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Released names → ours."""
    renamed = {}
    for name, tensor in weights.items():
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        if name not in _BUFFERS:
            renamed[name] = tensor
    return renamed


def _fill(model: DiT, weights: dict[str, Tensor], folder: Path) -> DiT:
    expected = model.state_dict()
    missing = sorted(expected.keys() - weights.keys())
    unknown = sorted(weights.keys() - expected.keys())
    if missing or unknown:
        what = f"{missing[0]} is missing" if missing else f"{unknown[0]} belongs to no layer"
        count = len(missing) + len(unknown)
        raise InputError(
            f"{folder}: the weights do not fit config.json: {what} ({count} such names in all)"
        )
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise InputError(
                f"{folder}: {name} has shape {list(tensor.shape)} but config.json asks for "
                f"{list(expected[name].shape)}"
            )
    model.load_state_dict(weights)
    return model


def resolve(source: str | Path) -> Path:
    """The local folder of a model; downloads a hub repository (safetensors and text files only).

    `starter` is the model that comes with the package.
    """
    path = Path(packaged(source)).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{source} is a file; give the model's folder")
    if str(source).startswith((".", "/", "~")) or str(source).count("/") != 1:
        raise InputError(
            f"no folder {source}; give a model folder, a hub id (owner/name), or starter"
        )
    try:
        return Path(
            snapshot_download(str(source), allow_patterns=["*.json", "*.txt", "*.safetensors"])
        )
    except HFValidationError:
        raise InputError(f"{source} is neither a folder nor a hub id (owner/name)") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"no folder {source}, and the hub could not give a repository of that name: {reason}"
        ) from None


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} has no config.json; is it a model folder?")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{path} does not hold a JSON object")
    return config


def _read_weights(folder: Path) -> dict[str, Tensor]:
    shards = sorted(folder.glob("model*.safetensors"))
    if not shards:
        pickled = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
        if pickled:
            raise InputError(
                f"{folder} has pickled weights only ({pickled[0]}), which can run code when "
                "opened; convert them to model.safetensors"
            )
        raise InputError(f"{folder} has no {WEIGHTS}")
    weights: dict[str, Tensor] = {}
    for shard in shards:
        try:
            with safe_open(shard, framework="pt") as file:
                weights.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{shard} is truncated or no safetensors file ({error}); fetch or save it again"
            ) from None
    return weights


def save_model(
    model: DiT, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Writes config, weights and tokenizer into `folder`, all or nothing.

    Each file is finished in a temporary folder beside it first and then renamed, so an
    interruption or a full disk leaves the earlier files whole. Other files there are kept.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with staging(folder) as temporary:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)


class staging:
    """A temporary folder inside `folder` whose files move up into it when all went well."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> Path:
        self.temporary = Path(tempfile.mkdtemp(prefix=".saving-", dir=self.folder))
        return self.temporary

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                for path in sorted(self.temporary.iterdir()):
                    os.replace(path, self.folder / path.name)
        finally:
            shutil.rmtree(self.temporary, ignore_errors=True)


AutoConfig.register(DiTConfig.model_type, DiTConfig, exist_ok=True)
AutoModel.register(DiTConfig, DiT, exist_ok=True)
