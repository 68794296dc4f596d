"""The network that a run trains: a new one, or one that goes on from another's weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from blockdiff.data.tokenizers import bos_id, eos_id
from blockdiff.errors import InputError
from blockdiff.models.adapted import Adapted
from blockdiff.models.chain import chain_of
from blockdiff.models.config import PRESETS, DiTConfig
from blockdiff.models.dit import DiT
from blockdiff.models.loading import check_tokenizer, settle_mask
from blockdiff.models.lora import add_lora
from blockdiff.registry import OBJECTIVES
from blockdiff.training.config import TrainConfig
from blockdiff.training.parallel import recompute_activations


def build_model(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, start: Any) -> Any:
    """The network to train, new or continued, as the configuration would have it."""
    objective = OBJECTIVES.find(config.objective)
    if objective.trains is not None:
        model: Any = _in_part(start, config, tokenizer, objective.trains)
    elif isinstance(start, Adapted):
        model = rewrapped(start, config)
        check_tokenizer(start, tokenizer)
    elif config.lora is not None:
        raise InputError("`lora` is for adapted models: name one as `init_from`")
    else:
        model = _build_dit(config, tokenizer, start)
        if config.compile:
            model.compile_layers()
    model.attention_backend = config.backend
    if config.checkpoint_activations:
        recompute_activations(model)
    return model


def rewrapped(start: Adapted, config: TrainConfig) -> Adapted:
    """An adapted model that goes on under the run's block size and context."""
    if start.config.causal:
        raise InputError(
            f"{config.init_from} is a plain causal model; make it a block diffusion model first: "
            f"blockdiff adapt {config.init_from} OUT"
        )
    objective = OBJECTIVES.find(config.objective)
    own = [name for name in ("compile", "time_conditioning") if getattr(config, name)]
    asked = objective.network.items()
    other = any(getattr(start.config, name, None) != value for name, value in asked)
    if own or other or not objective.noised:
        option = own[0] if own else f"objective {objective.name}"
        raise InputError(f"`{option}` is for the package's own networks; leave it out")
    if start.config.draft_rank:
        raise InputError(
            f"{config.init_from} has a drafter beside a model that stays what it is: train it with "
            "`objective` draft"
        )
    if config.length > start.config.length:
        raise InputError(
            f"`length` is {config.length}, but the model's context is {start.config.length} tokens"
        )
    # What a text does not reach, such as a part that sees images, would wait for gradients in DDP.
    text = nn.ModuleList([start.lm.get_decoder(), start.get_output_embeddings()])
    reached = {id(parameter) for parameter in text.parameters()}
    for parameter in start.parameters():
        parameter.requires_grad_(id(parameter) in reached)
    if objective.blocks == "whole":
        start.config.length = config.length
    start.config.use_blocks(config.trained_sizes)
    start.config.objective = objective.name
    clip = config.clip_range()
    start.config.clip = None if clip is None else list(clip)
    if config.lora is not None:
        source = Path(str(config.init_from)).expanduser()
        base = str(source.resolve()) if source.is_dir() else str(source)
        add_lora(start, config.lora, config.lora_targets, base)
    return start


def _in_part(
    start: Any,
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    trains: Callable[[str], bool],
) -> Any:
    """The model to start from as it is, of which only some parameters are trained."""
    check_tokenizer(start, tokenizer)
    own = start.config
    if config.length > own.length:
        raise InputError(
            f"`length` is {config.length}, but the model's context is {own.length} tokens"
        )
    if own.time_conditioning:
        raise InputError(f"{config.init_from} is conditioned on time, and a drafted token has none")
    if config.chain_rank not in (0, own.chain_rank):
        own.chain_rank = config.chain_rank
        start.chain = chain_of(own)
    for name, parameter in start.named_parameters():
        parameter.requires_grad_(trains(name))
    if not any(parameter.requires_grad for parameter in start.parameters()):
        raise InputError(
            f"{config.init_from} has nothing that drafts: give `chain_rank`, for example 64"
        )
    return start


def _build_dit(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, start: DiT | None) -> DiT:
    """A new network, or one that continues from `start` under another objective or block size.

    From an AR model a block diffusion model takes every weight; its adaLN, which AR does not have,
    starts with open gates and no shift or scale, so at first it computes exactly what AR did.
    """
    objective = OBJECTIVES.find(config.objective)
    sizes: dict[str, Any] = dict(PRESETS[config.preset])
    adaln = config.adaln
    if start is not None:
        sizes = {name: getattr(start.config, name) for name in sizes}
        settle_mask(start, tokenizer)
        check_tokenizer(start, tokenizer)
        adaln = adaln or start.config.adaln
    model = DiT(
        DiTConfig(
            vocab_size=start.config.vocab_size if start is not None else len(tokenizer),
            length=config.length,
            block_size=config.effective_block_size,
            block_sizes=config.trained_sizes,
            adaln=adaln,
            dropout=config.dropout,
            keep_first=True,
            mask_token_id=tokenizer.mask_token_id,
            bos_token_id=bos_id(tokenizer),
            eos_token_id=eos_id(tokenizer),
            initial_shift=config.initial_shift,
            initial_gate=0.0 if start is None else 1.0,
            clip=config.clip_range(),
            objective=objective.name,
            chain_rank=getattr(start, "config", config).chain_rank
            if config.chain_rank == 0
            else config.chain_rank,
            **{
                "time_conditioning": config.time_conditioning,
                "clean_stream": config.clean,
                "prediction": _prediction(config, start),
                **objective.network,
                **sizes,
            },
        )
    )
    if start is not None:
        take_weights(model, start)
    return model


def _prediction(config: TrainConfig, start: DiT | None) -> str:
    """What the logits at i are for: as in the model to start from, unless that is AR."""
    if start is None or start.config.causal:
        return config.prediction
    return start.config.prediction


def take_weights(model: nn.Module, start: nn.Module) -> None:
    """Copies every weight both networks have; only adaLN and chain may be on one side alone."""
    own, given = model.state_dict(), start.state_dict()
    for name, tensor in own.items():
        if name in given:
            tensor.copy_(given[name])
        elif "modulation" not in name and not name.startswith(("sigma.", "chain.")):
            raise InputError(f"the model to start from has no {name}")
