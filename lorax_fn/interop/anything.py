"""Adapters of any kind at a path, read without their base, to be looked at and converted."""

import contextlib
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from lorax_fn import checkpoint
from lorax_fn.core.adapters import Adapter
from lorax_fn.core.errors import LoraError, error
from lorax_fn.core.layouts import Layout
from lorax_fn.interop import kohya, peft
from lorax_fn.interop.checkpoints import Table, open_checkpoint
from lorax_fn.interop.files import open_tensors, read_tensors
from lorax_fn.interop.kohya_keys import COMPONENTS, is_of_another, split_key
from lorax_fn.interop.peft_keys import by_module, is_conv1d_name

TABLE, LINEAR = Layout((), (0,), (1,)), Layout((), (1,), (0,))


def kind_of(path: str | os.PathLike) -> str:
    """``"peft"``, ``"orbax"``, ``"kohya"`` or ``"checkpoint"``, by the files at ``path``.

    Raises:
      LoraError: it is none of these.
    """
    path = pathlib.Path(path)
    if path.is_file() and path.suffix == ".safetensors":
        with open_tensors(path) as file:
            return "kohya" if any(split_key(name) for name in file.names) else "checkpoint"
    if (path / peft.CONFIG).is_file():
        return "peft"
    if (path / "adapter.json").is_file() or any(path.glob("step-*")):
        return "orbax"
    if any(path.glob("*.safetensors")):
        return "checkpoint"
    raise error(
        "there is no adapter or checkpoint at this path.",
        path=path,
        got="nothing" if not path.exists() else "other files",
        want="a PEFT folder, an adapter checkpoint of lorax_fn, a Kohya file or a folder of .safetensors",
        do="check the path.",
    )


@contextlib.contextmanager
def tensors_of(path: str | os.PathLike) -> Iterator[Table]:
    """The tensors of a checkpoint: a folder, or one file of it."""
    path = pathlib.Path(path)
    if path.is_file():
        with open_tensors(path) as file:
            yield Table({path.name: file})
    else:
        with open_checkpoint(path) as table:
            yield table


def read(path: str | os.PathLike, component: str | None = None) -> dict[str, Adapter]:
    """The adapters at a path, by the names in the file."""
    kind = kind_of(path)
    if kind == "orbax":
        return checkpoint.load(path)
    if kind == "peft":
        params, layout = _base_of_peft(pathlib.Path(path))
        return peft.load(path, params, layout=layout)
    if kind == "kohya":
        component = component or components_of(path)[0]
        params, layout = _base_of_kohya(pathlib.Path(path), component)
        return kohya.load(path, params, component=component, layout=layout)
    raise error("this is a checkpoint of weights, not an adapter.", path=path, do="name an adapter.")


def components_of(path: str | os.PathLike) -> list[str]:
    """The components of a pipeline that have keys in a Kohya file."""
    with open_tensors(path) as file:
        found = [c for c in COMPONENTS if any(_is_of(name, c) for name in file.names)]
    return found or ["unet"]


def _is_of(name: str, component: str) -> bool:
    return name.startswith((*COMPONENTS[component], f"{component}.")) and not is_of_another(name, component)


def _base_of_peft(folder: pathlib.Path) -> tuple[dict[str, Any], dict[str, Layout]]:
    """The base as far as the tensors describe it: shapes, under torch's names."""
    config, tensors = peft.config(folder), read_tensors(folder / peft.TENSORS)
    modules, plain, _ = by_module(tensors)
    shapes: dict[str, tuple[int, ...]] = {}
    layout: dict[str, Layout] = {}
    wanted = [t for t in config.get("target_parameters") or [] if isinstance(t, str)]
    for module, parts in modules.items():
        shape = _shape(parts)
        if module.endswith(".base_layer") or any(t.rpartition(".")[0] in module for t in wanted):
            raise _needs_base("adapters of expert parameters", folder, module)
        if shape is None:
            continue
        name = f"{module}.weight"
        if config.get("fan_in_fan_out") and is_conv1d_name(module) and len(shape) == 2:
            shapes[name], layout[name] = shape[::-1], TABLE  # (in, out), as GPT-2 has it
            continue
        shapes[name] = shape
        table = "lora_embedding_A" in parts or "trainable_tokens_delta" in parts
        layout[name] = TABLE if table else Layout((), tuple(range(1, len(shape))), (0,))
        if "lora_B.bias" in parts:
            raise _needs_base("an adapter with lora_bias", folder, module)
    if config.get("fan_in_fan_out") and not any(map(is_conv1d_name, modules)):
        raise _needs_base("an adapter with fan_in_fan_out, some of whose weights are (in, out),", folder, "")
    for name, x in plain.items():
        shapes.setdefault(name.replace(".base_layer.", "."), x.shape)
    params = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
    return params, layout


def _needs_base(what: str, folder: pathlib.Path, module: str) -> LoraError:
    return error(
        f"{what} cannot be read without the base.",
        path=folder,
        **({"got": module} if module else {}),
        do="lx.peft.load(path, params); in the command, --base and the folder of the base's checkpoint.",
    )


def _base_of_kohya(path: pathlib.Path, component: str) -> tuple[dict[str, Any], dict[str, Layout]]:
    with open_tensors(path) as file:
        tensors = {n: file[n] for n in file.names if not is_of_another(n, component)}
    modules: dict[str, dict[str, np.ndarray]] = {}
    for name, x in tensors.items():
        found = split_key(name)
        if found is not None:
            modules.setdefault(found[0], {})[found[1]] = x
    params, layout = {}, {}
    for module, parts in modules.items():
        renamed = {{"down": "lora_A.weight", "up": "lora_B.weight"}.get(k, k): x for k, x in parts.items()}
        shape = _shape(renamed)
        if shape is not None:
            params[f"{module}.weight"] = jax.ShapeDtypeStruct(shape, "float32")
            layout[f"{module}.weight"] = Layout((), tuple(range(1, len(shape))), (0,))
    return params, layout


def _shape(parts: Mapping[str, np.ndarray]) -> tuple[int, ...] | None:
    """The weight's shape, as its factors imply it."""
    for a, b in (("lora_A.weight", "lora_B.weight"), ("lora_A", "lora_B")):
        if a in parts and b in parts and parts[a].ndim > 1 and parts[b].ndim > 1:
            window = parts["mid"].shape[2:] if "mid" in parts else parts[a].shape[2:]
            return (parts[b].shape[0], parts[a].shape[1], *window)
    if "lora_embedding_A" in parts and "lora_embedding_B" in parts:
        return (parts["lora_embedding_A"].shape[1], parts["lora_embedding_B"].shape[0])
    if "hada_w1_a" in parts and "hada_w1_b" in parts and "hada_t1" not in parts:
        return (parts["hada_w1_a"].shape[0], parts["hada_w1_b"].shape[1])
    if "lokr_w1" in parts and ("lokr_w2" in parts or "lokr_w2_a" in parts):
        w1, w2 = parts["lokr_w1"], parts.get("lokr_w2")
        rows = w2.shape[0] if w2 is not None else parts["lokr_w2_a"].shape[0]
        columns = math.prod(w2.shape[1:]) if w2 is not None else parts["lokr_w2_b"].shape[1]
        return (w1.shape[0] * rows, w1.shape[1] * columns)
    return None
