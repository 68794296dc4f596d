"""What several test files share: small networks, and the golden tensors."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

from blockdiff import attention
from blockdiff.attention import make_mask
from blockdiff.layout import BlockLayout
from blockdiff.models.config import DiTConfig
from blockdiff.models.dit import DiT
from blockdiff.sampling.generate import stream_tokens
from blockdiff.sampling.options import SamplingOptions
from blockdiff.sampling.step import Step

# The first part that is in a parameter's name gives its standard deviation.
_SCALES = (
    ("norm", 0.1),
    ("modulation", 0.1),
    ("bias", 0.1),
    ("embedding", 0.1),
    ("output.linear", 0.3),
    ("attention_out", 0.6),
    ("qkv", 0.6),
    ("", 0.2),
)
GOLDEN = Path(__file__).parent / "golden"
# Plain texts, for tokenizers and as samples.
TEXTS = [
    f"the {a} {b} walks over the {c} and then it sees the {a} {b} again"
    for a in ("old", "small", "red") for b in ("dog", "cat", "man", "bird")
    for c in ("hill", "field", "road", "wall")
]  # fmt: skip


def tiny_model(
    vocab_size: int = 5, length: int = 12, block_size: int = 4, seed: int = 0, **settings: Any
) -> DiT:
    """A small network in which every weight is drawn: none is idle.

    The scales make attention matter: with 8 tokens its distributions have about 1.4 of the 2.1 nats
    possible, and other tokens in the clean block before move a third of the probability.
    """
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "cond_size": 8}
    config = DiTConfig(vocab_size, length, block_size, dropout=0.0, **(sizes | settings))
    model = DiT(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * next(std for part, std in _SCALES if part in name))
            if "norm" in name:
                parameter.add_(1)
            elif name.startswith("layers") and name.endswith("modulation.bias"):
                parameter.view(6, -1)[[2, 5]] += 1  # the gates
    return model


def save_gpt2(folder: Path, tokenizer: Any) -> Path:
    """A random network of transformers' own in a folder, with its tokenizer."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def random_tokens(model: DiT, *shape: int, seed: int = 0) -> Tensor:
    """Token ids without the mask token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.mask_token_id, shape, generator=generator)


def random_masks(x_0: Tensor, mask_token_id: int, seed: int = 0) -> Tensor:
    """x_0 with about half of the tokens masked."""
    masked = torch.rand(x_0.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    return torch.where(masked, mask_token_id, x_0)


def attend(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, kind: str, backend: str = "blockwise"
) -> Tensor:
    """Attention under a mask made for this call alone."""
    mask = make_mask(layout, kind, backend, q.device, rows=len(q))
    return attention.attend(q, k, v, mask)


def read_golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """(config, weights under their released names, inputs and outputs) of a golden file."""
    parts: dict[str, dict[str, Tensor]] = {"weights": {}, "io": {}}
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        config = json.loads((file.metadata() or {}).get("config", "{}"))
        for key in file.keys():  # noqa: SIM118 - not a dict
            part, rest = key.split("/", 1)
            parts[part][rest] = file.get_tensor(key)
    return config, parts["weights"], parts["io"]


def sampling_steps(model, prompts, rows=None, limit=2000, **options: Any) -> list[Step]:
    """All steps of `stream_tokens`, with a limit so that a loop without end fails."""
    steps = stream_tokens(model, prompts, SamplingOptions(**options), rows)
    taken = list(islice(steps, limit))
    assert len(taken) < limit, "does not end"
    return taken


class Operators(TorchDispatchMode):
    """Notes every operator, forward and backward, with the shapes of the tensors it makes."""

    WAITS = ("nonzero", "_local_scalar_dense", "masked_select", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        indexed = args[1] if name in ("index", "index_put", "index_put_") else []
        by_bool = any(x is not None and x.dtype == torch.bool for x in indexed)
        self.names.append("nonzero" if by_bool else name)
        for made in out if isinstance(out, tuple | list) else [out]:
            if isinstance(made, Tensor):
                self.shapes.append(tuple(made.shape))
        return out

    def waits(self) -> list[str]:
        """The operators for which a GPU would wait for the host, or it for the GPU."""
        return [name for name in self.names if name in self.WAITS]

    def tables(self, sizes: set[int]) -> list[tuple[int, ...]]:
        """Shapes of the matrices both of whose sizes are among these."""
        return [shape for shape in self.shapes if len(shape) == 2 and set(shape) <= sizes]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A disk that takes files of up to so many bytes, as far as a write can tell."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
