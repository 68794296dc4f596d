"""LoRA (Hu et al. 2021) on an adapted model, by peft: W + (α/r)·B·A, of which A and B are trained.

The base model's weights stay as they are; trained are the low-rank pairs, and the mask token's row
of the embedding table, which the base model has never seen. At the start B = 0: the model is the
one it was.

    add_lora(model, rank=16)      the pairs, into the model's layers
    model.adapter.merged_state    the weights of an ordinary folder, the pairs added in
    model.adapter.save            a folder of peft's own layout, some megabytes; `open_adapter`
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blockdiff.errors import InputError, first_line, need
from blockdiff.models.adapted import Adapted
from blockdiff.outputs import staging

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ROW = "mask_row.safetensors"  # no part of peft's layout
_PREFIX = "base_model.model."  # of names in peft's files
EVERY_LAYER = "all-linear"


def require_peft() -> Any:
    """The module; raises `InputError` where it is not installed."""
    return need("peft", extra="adapt", what="LoRA")


def add_lora(
    model: Adapted, rank: int, targets: str = EVERY_LAYER, base: str | None = None
) -> None:
    """Puts pairs of `rank` into the linear maps named by `targets`, "q_proj,v_proj" for example.

    By default into every linear map but the output's. α is 2r. `base`: where the base model is, for
    the adapter's own folder. Raises `InputError` for a layer that is not there.
    """
    peft = require_peft()
    names: Any = targets if targets == EVERY_LAYER else targets.split(",")
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=names, task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )  # fmt: skip
    linear = (name for name, m in model.lm.named_modules() if isinstance(m, nn.Linear))
    known = {name.rpartition(".")[2] for name in linear}
    if missing := [name for name in names if targets != EVERY_LAYER and name not in known]:
        raise InputError(
            f"no linear map {missing[0]!r} in this model for `lora_targets`; there are "
            f"{', '.join(sorted(known))}"
        )
    _inject(model, config)


def _inject(model: Adapted, config: Any) -> None:
    device, dtype = model.device, model.dtype
    require_peft().inject_adapter_in_model(config, model.lm)
    for parameter in model.lm.parameters():
        parameter.data = parameter.data.to(device=device, dtype=dtype)
    model.adapter = Adapter(config)
    table: Any = model.get_input_embeddings()
    table.mask_token_id = model.config.mask_token_id
    table.mask_row = nn.Parameter(table.weight[table.mask_token_id].detach().clone())
    table.register_forward_hook(_with_mask_row)


def _with_mask_row(table: Any, given: tuple[Tensor], embedded: Tensor) -> Tensor:
    """The embeddings with the row that is trained where the mask token is.

    peft's own way, trainable token indices, copies the whole table in every pass.
    """
    row = table.mask_row * getattr(table, "embed_scale", 1.0)
    return torch.where(
        (given[0] == table.mask_token_id)[..., None], row.to(embedded.dtype), embedded
    )


@contextmanager
def _merged(model: Adapted) -> Iterator[None]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in model.lm.modules() if isinstance(m, BaseTunerLayer)]
    for layer in layers:
        layer.merge()
    try:
        yield
    finally:
        for layer in layers:
            layer.unmerge()


class Adapter:
    """What a model with pairs in its layers is asked for; `config` is peft's."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def merged_state(self, model: Adapted) -> dict[str, Tensor]:
        """The weights of the base model's folder with the pairs added in, by its own names."""
        with _merged(model):
            table: Any = model.get_input_embeddings()
            own = table.weight.detach().clone()
            own[table.mask_token_id] = table.mask_row.detach()
            state, address = {}, table.weight.data_ptr()
            for name, tensor in model.lm.state_dict().items():
                if "lora_" not in name and not name.endswith("mask_row"):
                    name = name.replace(".base_layer.", ".")
                    state[name] = own if tensor.data_ptr() == address else tensor.clone()
        return state

    def save(self, model: Adapted, folder: str | Path) -> None:
        """Writes the pairs in peft's layout, and the mask token's row beside them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with staging(folder) as temporary:
            self._write(model, temporary)

    def _write(self, model: Adapted, folder: Path) -> None:
        state = require_peft().get_peft_model_state_dict(model.lm, save_embedding_layers=False)
        named = {f"{_PREFIX}{name}": x.contiguous() for name, x in state.items()}
        save_file(named, folder / WEIGHTS, metadata={"format": "pt"})
        table: Any = model.get_input_embeddings()
        save_file({"mask_row": table.mask_row.detach()}, folder / ROW)
        self.config.save_pretrained(folder)


def base_of(folder: Path) -> str:
    """Where the base model of an adapter is; raises `InputError` where it cannot be found."""
    try:
        named = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        base = named["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str):
        raise InputError(f"{folder / CONFIG} does not say what its base model is")
    if not Path(base).is_dir() and (base.startswith((".", "/", "~")) or base.count("/") != 1):
        raise InputError(f"the base model of the adapter in {folder} is missing: no folder {base}")
    return base


def open_adapter(model: Adapted, folder: Path) -> Adapted:
    """The model with the adapter in `folder`; raises `InputError` where they do not fit."""
    peft = require_peft()
    if not isinstance(model, Adapted):
        raise InputError(f"the base model of the adapter in {folder} is no adapted model")
    try:
        _inject(model, peft.LoraConfig.from_pretrained(folder))
        state = {
            name.removeprefix(_PREFIX): tensor
            for name, tensor in load_file(folder / WEIGHTS).items()
        }
        found = peft.set_peft_model_state_dict(model.lm, state)
        if (folder / ROW).is_file():
            table: Any = model.get_input_embeddings()
            table.mask_row.data.copy_(load_file(folder / ROW)["mask_row"])
    except Exception as error:
        what = "is no adapter for its base model"
        raise InputError(f"{folder} {what}: {first_line(error)}") from None
    if found.unexpected_keys:
        raise InputError(f"{folder}: {found.unexpected_keys[0]} belongs to no layer of the base")
    return model
