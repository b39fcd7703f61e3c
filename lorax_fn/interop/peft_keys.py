"""The names in a PEFT adapter file: which part of which module each is, and what belongs together."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax_fn.core.adapters import Adapter
from lorax_fn.core.errors import error
from lorax_fn.interop.peft_config import PREFIX, ends_with

_PARTS = (
    *("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B"),
    *("lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_A", "lora_B", "lora_E"),
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    *("vera_lambda_b", "vera_lambda_d", "token_adapter.trainable_tokens_delta", "trainable_tokens_delta"),
)
REQUIRED = {
    "lora_A.weight": "lora_B.weight",
    "lora_B.weight": "lora_A.weight",
    "lora_embedding_A": "lora_embedding_B",
    "lora_embedding_B": "lora_embedding_A",
    "lora_B.bias": "lora_B.weight",
    "lora_magnitude_vector": "lora_B.weight or lora_embedding_B",
    "lora_A": "lora_E",
    "lora_E": "lora_B",
    "vera_lambda_b": "vera_lambda_d",
    "vera_lambda_d": "vera_lambda_b",
}


def by_module(
    tensors: Mapping[str, np.ndarray],
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray], list[str]]:
    """Parts of adapters by module, other tensors by name, and a line for each name that is not PEFT's."""
    modules: dict[str, dict[str, np.ndarray]] = {}
    plain: dict[str, np.ndarray] = {}
    strange = []
    for key, x in tensors.items():
        if key in ("base_model.vera_A", "base_model.vera_B"):
            modules.setdefault("", {})[key.rpartition(".")[2]] = x
            continue
        if not key.startswith(PREFIX):
            strange.append(f"{key}: its name does not begin with {PREFIX!r}")
            continue
        name = key.removeprefix(PREFIX)
        part = next((p for p in _PARTS if name.endswith(f".{p}")), None)
        if part is None:
            plain[name] = x
        else:
            short = part.removeprefix("token_adapter.")
            short = "lora_magnitude_vector" if short == "lora_magnitude_vector.weight" else short
            modules.setdefault(name.removesuffix(f".{part}"), {})[short] = x
    return modules, plain, strange


def is_conv1d_name(module: str) -> bool:
    """Whether a module has a name that GPT-2 gives its Conv1D, whose weight is (in, out)."""
    name = module.rpartition(".")[2]
    return re.fullmatch(r"c(_.*)?|q_attn|.*conv1d.*", name, re.IGNORECASE) is not None


def has(parts: Mapping, names: str) -> bool:
    return any(name in parts for name in names.split(" or "))


def registered(parameters: list[str], by_name: bool) -> list[str]:
    """The parameters of one module in the order in which it registers them, by which PEFT nests their layers.

    With a mapping it is the mapping's order; without one, only Hugging Face's gate_up before down is known.
    """
    if not by_name:
        return parameters
    known = ["gate_up_proj", "gate_up_proj_bias", "down_proj"]
    last = [p.rpartition(".")[2] for p in parameters]
    if not set(last) <= set(known):
        raise error(
            "which of these parameters their module registers first is not known, and PEFT nests by it.",
            path=parameters,
            do="pass mapping= with these parameters in the order of the module's __init__.",
        )
    return sorted(parameters, key=lambda p: known.index(p.rpartition(".")[2]))


def token_ids(module: str, config: Mapping[str, Any]) -> list[int] | None:
    """The rows that ``trainable_token_indices`` names for a module; None where it is not a list of ids."""
    ids = config.get("trainable_token_indices")
    if isinstance(ids, dict):
        ids = next(
            (x for key, x in ids.items() if isinstance(key, str) and ends_with(re.escape(key), module)), None
        )
    if not isinstance(ids, list) or not ids or len(set(map(str, ids))) != len(ids):
        return None
    whole = all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31 for i in ids)
    return ids if whole else None


def on_device(lora: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """The adapters with JAX arrays instead of NumPy's, copied so that nothing refers to the file."""

    def moved(adapter: Any) -> Any:
        arrays = {
            f.name: jnp.array(x)
            for f in dataclasses.fields(adapter)
            if isinstance(x := getattr(adapter, f.name), np.ndarray)
        }
        return dataclasses.replace(adapter, **arrays)

    return {path: moved(adapter) for path, adapter in lora.items()}
