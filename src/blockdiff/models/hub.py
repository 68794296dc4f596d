"""Opening and saving model folders: our own, and the paper's released checkpoints.

A released folder is recognised by its `config.json` and its weights are renamed; nothing after
`load_model` knows where a model came from. Weights are safetensors, never pickles.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from blockdiff.errors import InputError, first_line
from blockdiff.models.adapting import is_causal_lm, open_adapted
from blockdiff.models.card import write_card
from blockdiff.models.config import DiTConfig
from blockdiff.models.dit import DiT
from blockdiff.outputs import staging
from blockdiff.registry import OBJECTIVES
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
_CLIP = ("sampling_eps_min", "sampling_eps_max")
_BUFFERS = ("rotary_emb.inv_freq", *_CLIP)


def load_model(source: str | Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """The model in a folder or hub repository, in evaluation mode.

    Opens what `save_model` and `Trainer` wrote and the released BD3-LM layout (BD3-LM, MDLM,
    SEDD-backbone and AR kinds). Raises `InputError` when there is no such folder, no weights, only
    pickled weights, or weights that are truncated, not finite or do not fit the configuration.

    Example:
        >>> import blockdiff
        >>> blockdiff.load_model("starter").config.block_size
        4
    """
    folder = resolve(source)
    raw = _read_config(folder)
    files = _weight_files(folder)
    if raw.get("model_type") == DiTConfig.model_type:
        config, rename = _described(DiTConfig.from_dict, raw, folder), {}
    elif "hidden_dim" in raw and "n_blocks" in raw:
        clips = _read_tensors(files, [name for name in files if name.endswith(_CLIP)])
        config = _described(lambda it: released_config(it, clips), raw, folder)
        rename = {name: released_name(name) for name in files}
    elif is_causal_lm(raw):
        adapted = open_adapted(folder, raw, dtype=dtype)
        adapted.name_or_path = str(folder)
        return adapted
    else:
        raise InputError(
            f"{folder}: model_type {raw.get('model_type')!r} is neither blockdiff nor a released "
            "BD3-LM, MDLM, SEDD or AR configuration"
        )
    if config.objective not in OBJECTIVES:
        raise InputError(
            f"{folder} was trained by the objective {config.objective!r}, which nothing has "
            "registered; name the module or file that does as `plugin`"
        )
    names = {rename.get(name, name): name for name in files}
    model = _described(lambda it: _empty(it, len(names)), config, folder)
    own = {name: tensor for name, tensor in names.items() if name not in _BUFFERS}
    _check_shapes(model, {name: files[own[name]] for name in own}, folder)
    tensors = _read_tensors(files, own.values())
    weights = {name: tensors[own[name]].to(dtype) for name in own}
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise InputError(
                f"{folder}: {own[name]} holds numbers that are not finite: the training that made "
                "it diverged; use an earlier checkpoint"
            )
    model.load_state_dict(weights, assign=True)
    model.requires_grad_(True)
    model.name_or_path = str(folder)
    generation = folder / GENERATION_CONFIG_NAME
    if generation.is_file():
        raw = _read_json(generation)
        model.generation_config = _described(GenerationConfig.from_dict, raw, generation)
    # Else the tokenizer says which id it is (`models.loading.settle_mask`).
    model.names_mask = any(raw.get(name) is not None for name in ("mask_token_id", "mask_index"))
    return model.eval()


def _described(make: Callable[[Any], Any], raw: Any, source: Path) -> Any:
    """`make(raw)`, every way in which a file can be no description as one line.

    `source`: the file, or the folder of a config.json.
    """
    file = source / "config.json" if source.is_dir() else source
    try:
        return make(raw)
    except InputError as error:
        raise InputError(f"{file} does not describe a model: {error}") from None
    except Exception as error:
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        raise InputError(f"{file} does not describe a model: {reason}") from None


def _empty(config: DiTConfig, tensors: int) -> DiT:
    """The network a configuration describes, without its memory."""
    # Each layer has more tensors than one: a configuration of more layers than there are tensors
    # is refused before as many objects are made.
    if config.num_hidden_layers > tensors:
        raise InputError(
            f"num_hidden_layers is {config.num_hidden_layers} but there are {tensors} weights"
        )
    with torch.device("meta"):
        return DiT(config)


def released_config(raw: dict[str, Any], weights: Mapping[str, Tensor]) -> DiTConfig:
    """Our configuration for a released `config.json`; the clip is read from its buffers.

    Raises `InputError` where it does not tell what the model is: a network that is fed the time
    may be SEDD or MDLM, with the same weights' names.
    """
    clip = [
        float(weights[name].flatten()[0])
        for key in _CLIP
        for name in (key, f"backbone.{key}")
        if name in weights
    ]
    two_stream = raw.get("cross_attn", True) and "block_size" in raw
    timed = raw.get("time_conditioning", False)
    if timed and two_stream and raw["block_size"] != raw["model_length"]:
        raise InputError(
            "a time-conditioned model of several blocks feeds its clean stream the noise level of "
            "the noised one, which this package does not: it would be another model"
        )
    if timed and "parameterization" not in raw:
        raise InputError(
            "it is fed the time, as SEDD is and MDLM may be; say which by adding "
            '"parameterization": "sedd" or "parameterization": "subs" to it'
        )
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
        score=timed and raw["parameterization"] == "sedd",
        mask_token_id=raw.get("mask_token_id", raw.get("mask_index")),
        clip=(clip[0], clip[1]) if len(clip) == 2 else None,
    )


def released_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under their released names → under ours, without the buffers."""
    renamed = {released_name(name): tensor for name, tensor in weights.items()}
    return {name: tensor for name, tensor in renamed.items() if name not in _BUFFERS}


def released_name(name: str) -> str:
    """Released name → ours."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _check_shapes(model: DiT, files: Mapping[str, tuple[Path, list[int]]], folder: Path) -> None:
    expected = model.state_dict()
    missing = sorted(expected.keys() - files.keys())
    unknown = sorted(files.keys() - expected.keys())
    if missing or unknown:
        what = f"{missing[0]} is missing" if missing else f"{unknown[0]} belongs to no layer"
        count = len(missing) + len(unknown)
        raise InputError(
            f"{folder}: the weights do not fit config.json: {what} ({count} such names in all)"
        )
    for name, (_, shape) in files.items():
        if shape != list(expected[name].shape):
            raise InputError(
                f"{folder}: {name} has shape {shape} but config.json asks for "
                f"{list(expected[name].shape)}"
            )


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
        raise InputError(
            f"no folder {source}, and the hub could not give a repository of that name: "
            f"{first_line(error)}"
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {first_line(error)}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} does not hold a JSON object")
    return found


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} has no config.json; is it a model folder?")
    return _read_json(path)


def _weight_files(folder: Path) -> dict[str, tuple[Path, list[int]]]:
    """Where each tensor is, and its shape, read from the files' headers alone.

    What is opened is model.safetensors, else the files model.safetensors.index.json names; others
    that lie beside them are no part of the model.
    """
    index = folder / f"{WEIGHTS}.index.json"
    if (folder / WEIGHTS).is_file():
        names = {WEIGHTS}
    elif index.is_file():
        shards = _read_json(index).get("weight_map")
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
    found: dict[str, tuple[Path, list[int]]] = {}
    for name in sorted(names):
        path = folder / name
        with _opened(path) as file:
            for key in file.keys():  # noqa: SIM118
                found[key] = path, list(file.get_slice(key).get_shape())
    return found


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file; what can be wrong with it in one line."""
    try:
        path.open("rb").close()  # safetensors calls every failure a missing file
        with safe_open(path, framework="pt") as file:
            yield file
    except OSError as error:
        raise InputError(f"cannot read {path}: {first_line(error)}") from None
    except SafetensorError as error:
        raise InputError(
            f"{path} is truncated or no safetensors file ({error}); fetch or save it again"
        ) from None


def _read_tensors(
    files: Mapping[str, tuple[Path, list[int]]], names: Iterable[str]
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    wanted = set(names)
    for path in {files[name][0] for name in wanted}:
        with _opened(path) as file:
            for name in wanted & set(file.keys()):
                tensors[name] = file.get_tensor(name)
    return tensors


def save_model(
    model: PreTrainedModel, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Writes config, weights and tokenizer into `folder`, all or nothing; then the model card.

    The card, README.md, is written from the run.json and evaluation.json that lie there; one of
    somebody else's stays. Each file is finished in a temporary folder beside it first and then
    renamed, so an interruption or a full disk leaves the earlier files whole. Other files there are
    kept.

    Example:
        >>> import blockdiff
        >>> model, tokenizer = blockdiff.load("starter")
        >>> blockdiff.save_model(model, "copy", tokenizer)
        >>> blockdiff.load("copy")[0].config.length == model.config.length
        True
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with staging(folder) as temporary:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
    write_card(folder, model.config)
