"""A model's card, its folder's README.md: what is known of it from the files that lie there.

run.json says what it was trained on and how, evaluation.json what was measured: the JSON of
`blockdiff evaluate` or `zero-shot`, one record, several by name, or a list. Nothing is guessed:
what no file says is not in the card.
"""

from __future__ import annotations

import json
import math
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open
from transformers import AutoConfig

from blockdiff.data.corpora import kind_of
from blockdiff.errors import InputError, first_line
from blockdiff.folders import CARD_MARK, is_marked
from blockdiff.outputs import write_text
from blockdiff.printing import markdown_table
from blockdiff.starter import packaged

CARD, RUN, EVALUATION = "README.md", "run.json", "evaluation.json"
_KINDS = {
    "ar": "An autoregressive language model",
    "bd3lm": "A block diffusion language model (BD3-LM)",
    "mdlm": "A masked diffusion language model (MDLM)",
    "sedd": "A score entropy diffusion language model (SEDD)",
}


def model_card(folder: str | Path, config: Any = None, name: str | None = None) -> ModelCard:
    """The card of the model in `folder`, from the run.json and evaluation.json that lie there.

    `config`: the model's configuration, read from the folder when left out. `name`: what it is
    called and loaded by, the folder's own when left out. Raises `InputError` for a damaged file.

    Example:
        >>> import blockdiff
        >>> card = blockdiff.model_card("starter", name="me/starter")
        >>> card.data.library_name, "L' = 4" in card.text
        ('blockdiff', True)
    """
    folder = Path(packaged(folder))
    config = AutoConfig.from_pretrained(folder) if config is None else config
    run, found = _read(folder / RUN) or {}, list(_measured(folder))
    title = name or folder.resolve().name
    data = ModelCardData(
        library_name="blockdiff",
        pipeline_tag="text-generation",
        tags=["block-diffusion", config.kind],
        datasets=[text for text in _texts(run) if kind_of(text)[1] == "hub"] or None,
        base_model=_hub_id(run.get("init_from")),
        model_name=title if found else None,
        eval_results=[_result(record) for record in found] or None,
    )
    parts = [f"# {title}", _network(config), _training(run), _figures(run, found, config.kind)]
    text = "\n\n".join(part for part in [*parts, _use(title), CARD_MARK] if part)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def write_card(folder: Path, config: Any) -> None:
    """Puts the card into the folder, unless a README.md of somebody else's is there.

    A damaged evaluation.json is no reason to lose a model: it is a warning.
    """
    path = folder / CARD
    if is_marked(path) or not path.exists():
        try:
            write_text(path, str(model_card(folder, config)))
        except InputError as error:
            warnings.warn(f"no model card was written: {error}", stacklevel=2)


def card_to_push(model: Any, repo_id: str, found: str) -> str:
    """The card that goes to the hub with a model, where transformers' own would be `found`.

    A card that somebody wrote stays. The files of the folder the model was opened from are read
    only if its weights are still that folder's: what was trained since has other figures.
    """
    given = ModelCard(found, ignore_metadata_errors=True)
    if CARD_MARK not in found and "has been automatically generated" not in found:
        return found
    source = Path(model.name_or_path)
    same = model.name_or_path and source.is_dir() and _has_weights_of(model, source)
    with tempfile.TemporaryDirectory() as empty:
        card = model_card(source if same else empty, model.config, repo_id)
    tags = [*card.data.get("tags"), *(given.data.get("tags") or [])]
    card.data["tags"] = list(dict.fromkeys(tags))
    return str(card)


def _has_weights_of(model: Any, folder: Path) -> bool:
    """Whether a folder's weights are the model's own, as far as its files' precision goes.

    An adapted model's are those of its base model, whose folder it is.
    """
    own = {name.removeprefix("lm."): weight for name, weight in model.state_dict().items()}
    for path in (found := sorted(folder.glob("model*.safetensors"))):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                if name not in own or not torch.equal(own[name].cpu().to(tensor.dtype), tensor):
                    return False
    return bool(found)


def _read(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {first_line(error)}") from None
    if not isinstance(found, dict | list):
        raise InputError(f"{path} holds no record")
    return found


def _measured(folder: Path) -> Iterator[dict[str, Any]]:
    """The records of evaluation.json, wherever in it they stand."""
    whole = _read(folder / EVALUATION) or []
    own = [whole] if isinstance(whole, list) or "perplexity" in whole else whole.values()
    for part in own:
        for record in part if isinstance(part, list) else [part]:
            if isinstance(record, dict) and isinstance(record.get("perplexity"), int | float):
                yield record


def _texts(run: Mapping[str, Any]) -> list[str]:
    data = run.get("data")
    return [data] if isinstance(data, str) else [str(one) for one in data or []]


def _hub_id(source: Any) -> str | None:
    """Where a run began, if that is a place everybody has."""
    local = not isinstance(source, str) or source.count("/") != 1 or Path(source).exists()
    return None if local else source


def _shown(source: Any) -> str:
    """A text or model as strangers may know it: of a place on a disk, the last name alone."""
    return str(source) if _hub_id(source) else Path(str(source)).name


def _network(config: Any) -> str:
    blocks = "" if config.kind == "ar" else f" in blocks of L' = {config.block_size}"
    return (
        f"{_KINDS.get(config.kind, 'A language model')}: {config.num_hidden_layers} layers of "
        f"width {config.hidden_size}, a context of {config.length:,} tokens{blocks}, a vocabulary "
        f"of {config.vocab_size:,}."
    )


def _training(run: Mapping[str, Any]) -> str:
    if not run:
        return ""
    steps = _finished(run).get("steps", run.get("steps"))
    words = f"**Trained** on {_names(run)}: {steps:,} steps"
    if run.get("batch_size") and run.get("length"):
        words += f" of {run['batch_size'] * run['length']:,} tokens"
    words += f" by the objective {run.get('objective')}"
    if run.get("objective") != "ar":
        words += f", masks drawn by {run.get('estimator')}"
    if run.get("init_from"):
        words += f", from the weights of {_shown(run['init_from'])}"
    return f"{words} (learning rate {run.get('lr')}, seed {run.get('seed')}; all of it: {RUN})."


def _finished(run: Mapping[str, Any]) -> dict[str, Any]:
    return (run.get("run") or {}).get("finished") or {}


def _figures(run: Mapping[str, Any], found: list[dict[str, Any]], kind: str) -> str:
    """A table of what was measured, with errors."""
    rows = []
    metrics = _finished(run).get("metrics") or {}
    if metrics.get("eval_perplexity") is not None:
        end = {"perplexity": metrics["eval_perplexity"], "stderr": metrics.get("eval_stderr")}
        rows.append(("validation at the end of the training", *_row(end, kind)))
    for record in found:
        part = f" ({record['part']})" if record.get("part") else ""
        rows.append((_names(record) + part, *_row(record, record.get("kind", kind))))
    if not rows:
        return ""
    table = markdown_table(("text", "perplexity ± s.e.", "bits per byte"), rows)
    bound = "; ≤ is an upper bound" if any("≤" in row[1] for row in rows) else ""
    return f"**Measured** (± one standard error over the sequences{bound}):\n\n{table}"


def _row(record: Mapping[str, Any], kind: str) -> tuple[str, str]:
    sign, perplexity, error = (
        "" if kind == "ar" else "≤ ",
        record["perplexity"],
        record.get("stderr"),
    )
    spread = None if error is None else perplexity * error  # that of the nats per token
    bits = _plus_minus(record.get("bits_per_byte"), record.get("bits_per_byte_stderr"), 3)
    return sign + _plus_minus(perplexity, spread, 2), sign * bool(bits) + bits


def _plus_minus(value: float | None, error: float | None, digits: int) -> str:
    if value is None:
        return ""
    known = error is not None and math.isfinite(error)
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if known else "")


def _names(record: Mapping[str, Any]) -> str:
    return ", ".join(map(_shown, _texts(record))) or "a text"


def _result(record: Mapping[str, Any]) -> EvalResult:
    data, bound = _names(record), "" if record.get("kind") == "ar" else " (upper bound)"
    return EvalResult(
        task_type="text-generation",
        dataset_type=data,
        dataset_name=data,
        dataset_split=record.get("part"),
        metric_type="perplexity",
        metric_name=f"perplexity{bound}",
        metric_value=round(float(record["perplexity"]), 4),
    )


def _use(name: str) -> str:
    return f"""## Use

```python
import blockdiff  # pip install blockdiff
model, tokenizer = blockdiff.load("{name}")
print(blockdiff.generate(model, "The", tokenizer=tokenizer, max_new_tokens=64).texts[0])
```

After `import blockdiff` transformers' `AutoModelForCausalLM` and `pipeline("text-generation")` open
it as well."""
