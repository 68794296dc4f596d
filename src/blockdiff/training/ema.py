"""The moving average of the weights, a torch `AveragedModel`.

    ema ← d·ema + (1 − d)·weights,  d = min(decay, (1 + n)/(10 + n)) after n updates

The warm-up of d lets short runs profit: a constant 0.9999 would still be mostly the initial
weights after 5,000 steps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel


class Average(AveragedModel):
    """A copy of a model, its `module`, that follows it: call `update_parameters` after every step.

    Where the model is sharded, shard `module` like it first (`parallel.shard_like`): each process
    then averages its own part. torch's own update, which waits for the GPU, is replaced by one that
    does not: `n_averaged`, the count of updates, stays on the host.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self.n_averaged = self.n_averaged.cpu()
        self.decay = decay
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if not parameter.requires_grad:  # what is not trained is shared
                path, _, leaf = name.rpartition(".")
                self.module.get_submodule(path)._parameters[leaf] = parameter
        self.requires_grad_(False)

    @property
    def trained(self) -> dict[str, Tensor]:
        """The averaged weights by name; those that are not trained are no average."""
        own = dict(self.module.named_parameters())
        return {name: own[name].detach() for name in self.names}

    def update_parameters(self, model: nn.Module) -> None:
        """One update by the weights as they are now; the first takes them as they are."""
        n = int(self.n_averaged)
        d = min(self.decay, (1 + n) / (10 + n)) if n else 0.0
        own, theirs = (self._parts(one) for one in (self.module, model))
        torch._foreach_lerp_(own, theirs, 1 - d)
        self.n_averaged += 1

    def _parts(self, model: nn.Module) -> list[Tensor]:
        """The trained parameters; of sharded ones, this process's shards."""
        all_of_them = dict(model.named_parameters())
        own = (all_of_them[name].detach() for name in self.names)
        return [p.to_local() if isinstance(p, DTensor) else p for p in own]
