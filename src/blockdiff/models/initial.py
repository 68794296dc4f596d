"""The weights that a new `DiT` begins with.

transformers initialises each tensor once, children first: what is special about a layer's linear
map has to be told by the map's own class.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import initialization as init

from blockdiff.models.chain import Chain
from blockdiff.models.config import DiTConfig
from blockdiff.models.layers import LayerNorm, Modulation, ResidualLinear


@torch.no_grad()
def initialise(module: nn.Module, config: DiTConfig) -> None:
    """The first weights of one module of a network; those of its children are there."""
    if isinstance(module, Chain):
        module.reset()
    elif isinstance(module, Modulation):
        init.zeros_(module.weight)
        init.copy_(module.bias, module.initial_bias(config))
    elif isinstance(module, ResidualLinear):
        # Residual branches start small, the deeper the network the smaller (GPT-2's rule).
        init.normal_(module.weight, std=0.02 / math.sqrt(2 * config.num_hidden_layers))
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.Linear | nn.Embedding):
        init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, LayerNorm):
        init.ones_(module.weight)
