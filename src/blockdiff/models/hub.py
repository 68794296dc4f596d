"""Opening and saving model folders: our own, adapted ones, and published checkpoints.

A folder of a published family becomes what its `Recipe` says; nothing after `load_model` knows
where a model came from. Weights are safetensors, never pickles.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME

from blockdiff.checks import whole_number
from blockdiff.device import choose_device
from blockdiff.errors import InputError, first_line
from blockdiff.models import lora
from blockdiff.models.adapted import RECORD, Adapted
from blockdiff.models.adapting import is_causal_lm, open_adapted, with_record
from blockdiff.models.card import write_card
from blockdiff.models.config import DiTConfig
from blockdiff.models.dit import DiT
from blockdiff.models.gated import read_draft
from blockdiff.models.recipe import Found, Recipe, renamed
from blockdiff.models.released import find_recipe
from blockdiff.models.released_lm import placed
from blockdiff.models.tensors import (
    WEIGHTS as WEIGHTS,
)
from blockdiff.models.tensors import (
    Piece,
    check_pieces,
    fill,
    find_tensors,
    read_json,
    require_memory,
    stored_dtype,
)
from blockdiff.outputs import staging
from blockdiff.registry import OBJECTIVES
from blockdiff.starter import packaged

Dtype = torch.dtype | Literal["auto"]
DeviceMap = str | dict[str, Any] | None


def load_model(
    source: str | Path,
    *,
    dtype: Dtype = torch.float32,
    mask_token_id: int | None = None,
    block_size: int | None = None,
    device_map: DeviceMap = None,
) -> Any:
    """The model in a folder or hub repository, in evaluation mode; no tokenizer is needed.

    Opens what `save_model` and `Trainer` wrote, causal language models of `transformers`, adapted
    or as they are (AR), and the published families of `models.released`. `dtype`: torch.bfloat16,
    or "auto" for the number format of the stored tensors. `mask_token_id` and `block_size`: where a
    folder does not store them; else they come before what it stores. `device_map`: a device, or for
    models of `transformers` also "auto" or a map from modules to devices, as there.

    Raises `InputError` when there is no such folder, no weights, only pickled weights, weights that
    are truncated, not finite, do not fit the configuration or would not fit into memory, or a model
    that is not supported.

    Example:
        >>> import blockdiff
        >>> blockdiff.load_model("starter").config.block_size
        4
    """
    if dtype != "auto" and not isinstance(dtype, torch.dtype):
        raise InputError(f"`dtype` is {dtype!r}; give a torch.dtype, or auto")
    if block_size is not None:
        whole_number("block_size", block_size)
    folder = resolve(source)
    if (folder / lora.CONFIG).is_file() and not (folder / "config.json").is_file():
        base = lora.base_of(folder)
        opened = load_model(
            base, dtype=dtype, mask_token_id=mask_token_id, block_size=block_size,
            device_map=device_map,
        )  # fmt: skip
        return _with_generation(lora.open_adapter(opened, folder), folder).eval()
    found = Found(folder, _read_config(folder), find_tensors(folder), mask_token_id, block_size)
    kind = stored_dtype(found.files) if dtype == "auto" else dtype
    if found.raw.get("model_type") == DiTConfig.model_type:
        recipe: Recipe | None = _own(found)
    else:
        recipe = _described(find_recipe, found, f"{folder}")
    if recipe is None and is_causal_lm(found.raw):
        recipe = _plain(found, kind)
    if recipe is not None and isinstance(recipe.config, DiTConfig):
        model: Any = _open_dit(recipe, recipe.config, found, kind, device_map)
    elif recipe is not None:
        model = _open_lm(recipe, recipe.config, found, kind, device_map)
    elif is_causal_lm(found.raw):
        numbers = sum(torch.Size(tensor.shape).numel() for tensor in found.files.values())
        require_memory(numbers, kind, folder)
        model = open_adapted(folder, found.raw, dtype=kind, device_map=device_map)
    else:
        raise InputError(
            f"{folder}: model_type {found.raw.get('model_type')!r} is neither one of blockdiff, "
            "nor a causal language model of transformers, nor a published model that is known"
        )
    if isinstance(model, Adapted) and (model.chain is not None or model.config.draft_rank):
        read_draft(model, folder)
    _described(lambda it: _say(it, mask_token_id, block_size), model, f"{folder}")
    model.name_or_path = str(folder)
    return _with_generation(model, folder).eval()


def _with_generation(model: Any, folder: Path) -> Any:
    """The model with what generation_config.json says, where there is one."""
    generation = folder / GENERATION_CONFIG_NAME
    if generation.is_file():
        raw = read_json(generation)
        own = _described(GenerationConfig.from_dict, raw, f"{generation}")
        for network in (model, getattr(model, "lm", model)):
            network.generation_config = own
    return model


def stored_mask(folder: Path) -> int | None:
    """The id of the mask token that a folder, or its family, names; None where none does."""
    raw = _read_config(folder)
    record = raw.get(RECORD)
    if isinstance(record, dict):
        return cast("int | None", record.get("mask_token_id"))
    if raw.get("model_type") == DiTConfig.model_type:
        return cast("int | None", raw.get("mask_token_id"))
    recipe = _described(find_recipe, Found(folder, raw, find_tensors(folder)), f"{folder}")
    if recipe is None or not recipe.names_mask:
        return None
    known = recipe.conventions or {"mask_token_id": recipe.config.mask_token_id}
    return cast(int, known["mask_token_id"])


def _own(found: Found) -> Recipe:
    config = _described(
        DiTConfig.from_dict, found.raw, f"{found.folder}/config.json does not describe a model"
    )
    names_mask = found.raw.get("mask_token_id") is not None
    return Recipe(config, renamed(()), names_mask=names_mask)


def _described(make: Callable[[Any], Any], raw: Any, where: str) -> Any:
    """`make(raw)`, every way in which a config.json can be no description as one line."""
    try:
        return make(raw)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{where}: config.json does not describe a model: {reason}") from None


def _without_memory(config: PreTrainedConfig, tensors: int) -> PreTrainedModel:
    """The network of a configuration, without the memory of its weights."""
    # Each layer has more tensors than one: a configuration of more layers than there are tensors
    # is refused before as many objects are made.
    layers = config.get_text_config().num_hidden_layers
    if layers > tensors:
        raise InputError(f"num_hidden_layers is {layers} but there are {tensors} weights")
    if isinstance(config, DiTConfig):
        with torch.device("meta"):
            return DiT(config)
    with init_empty_weights(include_buffers=False):  # some buffers are computed, not stored
        made: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return made


def _open_dit(
    recipe: Recipe, config: DiTConfig, found: Found, dtype: torch.dtype, device_map: DeviceMap
) -> DiT:
    folder, pieces = found.folder, recipe.pieces(found.files)
    if config.objective not in OBJECTIVES:
        raise InputError(
            f"{folder} was trained by the objective {config.objective!r}, which nothing has "
            "registered; name the module or file that does as `plugin`"
        )
    if not isinstance(device_map, str | None) or device_map == "auto":
        raise InputError("`device_map` of this model can only name one device; give cpu or cuda")
    device = choose_device(device_map or "cpu")
    where = f"{folder}/config.json does not describe a model"
    model: Any = _described(lambda it: _without_memory(it, len(pieces)), config, where)
    expected = model.state_dict()
    check_pieces(expected, pieces, found.files, folder)
    require_memory(sum(tensor.numel() for tensor in expected.values()), dtype, folder, [device])
    fill(model, pieces, found.files, dtype, folder, lambda name: device)
    # Else the tokenizer says which id it is (`models.loading.settle_mask`).
    model.names_mask = recipe.names_mask
    return model


def _open_lm(
    recipe: Recipe,
    config: PreTrainedConfig,
    found: Found,
    dtype: torch.dtype,
    device_map: DeviceMap,
) -> Any:
    """A model whose layers are those of a class of `transformers`."""
    folder = found.folder
    lm: Any = _described(lambda it: _without_memory(it, len(found.files)), config, f"{folder}")
    expected, pieces = _untied(lm, recipe, found)
    check_pieces(expected, pieces, found.files, folder)
    places = _places(lm, device_map, dtype)
    devices = list(dict.fromkeys(places.values()))
    require_memory(sum(tensor.numel() for tensor in expected.values()), dtype, folder, devices)
    fill(lm, pieces, found.files, dtype, folder, lambda name: _place_of(name, places))
    lm.tie_weights()
    lm = lm.to(devices[0]) if len(devices) == 1 else dispatch_model(lm, places)
    name = f"config.json: {RECORD}" if RECORD in found.raw else "config.json"
    return with_record(lm, recipe.conventions, folder / name)


def _untied(
    lm: PreTrainedModel, recipe: Recipe, found: Found
) -> tuple[dict[str, Tensor], dict[str, list[Piece]]]:
    """The tensors a network has and the pieces a folder has, without those tied to another."""
    tied = lm.all_tied_weights_keys
    expected, pieces = lm.state_dict(), recipe.pieces(found.files)
    return (
        {name: tensor for name, tensor in expected.items() if name not in tied},
        {name: own for name, own in pieces.items() if name not in tied},
    )


def _plain(found: Found, dtype: torch.dtype) -> Recipe | None:
    """A folder of `transformers` whose tensors have their class's names.

    None where `transformers` has to convert them, or keeps some in another number format.
    """
    config = _described(AutoConfig.from_pretrained, found.folder, f"{found.folder}")
    config.__dict__.pop(RECORD, None)
    recipe = Recipe(config, placed(config), found.raw.get(RECORD))
    lm: Any = _described(
        lambda it: _without_memory(it, len(found.files)), config, f"{found.folder}"
    )
    mixed = dtype != torch.float32 and (
        lm._keep_in_fp32_modules or getattr(lm, "_keep_in_fp32_modules_strict", None)
    )
    expected, pieces = _untied(lm, recipe, found)
    return None if mixed or expected.keys() != pieces.keys() else recipe


def _places(lm: PreTrainedModel, device_map: DeviceMap, dtype: torch.dtype) -> dict[str, Any]:
    """Module → device; "auto" is what accelerate makes of the devices there are."""
    if device_map == "auto":
        classes = list(lm._no_split_modules or [])
        found = dict(infer_auto_device_map(lm, no_split_module_classes=classes, dtype=dtype))
    else:
        found = device_map if isinstance(device_map, dict) else {"": device_map or "cpu"}
    if "disk" in found.values():
        raise InputError("the devices have no room for the model, and none is kept on disk")
    return {name: choose_device(_device(place)) for name, place in found.items()}


def _device(place: Any) -> str:
    return f"cuda:{place}" if isinstance(place, int) else str(place)


def _place_of(name: str, places: dict[str, Any]) -> Any:
    """The device of the longest module name that a tensor's name begins with."""
    parts = name.split(".")
    for count in range(len(parts), -1, -1):
        if ".".join(parts[:count]) in places:
            return places[".".join(parts[:count])]
    raise InputError(f"`device_map` has no device for {name}")


def _say(model: Any, mask_token_id: int | None, block_size: int | None) -> None:
    """Gives a model's configuration the mask token and the block size that were said."""
    config = model.config
    if mask_token_id is not None and mask_token_id != config.mask_token_id:
        if config.mask_token_id >= config.vocab_size:
            raise InputError("a plain causal model has no mask token; adapt it first")
        config.mask_token_id = whole_number(
            "mask_token_id", mask_token_id, 0, config.vocab_size - 1
        )
    if mask_token_id is not None:
        model.names_mask = True
    if block_size is None or config.causal or block_size == config.block_size:
        return
    if config.score:
        raise InputError("a SEDD model has one block: leave `block_size` out")
    if not config.slides:
        config.length -= config.length % block_size
    if block_size > config.length or config.length % block_size:
        raise InputError(
            f"block size {block_size} does not divide the model's context of {config.length} tokens"
        )
    config.block_size = block_size


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
            snapshot_download(
                str(source), allow_patterns=["*.json", "*.jinja", "*.txt", "*.safetensors"]
            )
        )
    except HFValidationError:
        raise InputError(f"{source} is neither a folder nor a hub id (owner/name)") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, RuntimeError) as error:
        raise InputError(
            f"no folder {source}, and the hub could not give a repository of that name: "
            f"{first_line(error)}"
        ) from None


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} has no config.json; is it a model folder?")
    raw = read_json(path)
    if not isinstance(raw.get("model_type"), str | None):
        raise InputError(f"{path}: model_type {raw['model_type']!r} is no name")
    return raw


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
