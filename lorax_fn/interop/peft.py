"""PEFT adapters: `load` and `save` of ``adapter_config.json`` and ``adapter_model.safetensors``.

Neither torch nor peft is needed. `load` returns ordinary adapters; `config` reads the other fields of a
config, which `save` writes back.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from lorax_fn.core.adapters import Adapter
from lorax_fn.core.errors import error
from lorax_fn.core.fitting import check_adapters, check_fits
from lorax_fn.core.trees import PyTree, flatten_with_paths, is_concrete
from lorax_fn.interop.cards import model_card
from lorax_fn.interop.files import (
    read_json,
    read_tensors,
    refuse_pickle,
    write_json,
    write_tensors,
    write_text,
)
from lorax_fn.interop.hub import local_folder, upload
from lorax_fn.interop.peft_config import alpha_name, check_config, with_others
from lorax_fn.interop.peft_keys import on_device
from lorax_fn.interop.peft_read import Reading
from lorax_fn.interop.peft_write import Writing
from lorax_fn.interop.servers import check_target, for_server
from lorax_fn.interop.weights import Leaves, known, known_by_adapters

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


def load(
    path: str | os.PathLike[str],
    params: PyTree,
    *,
    mapping: Mapping[str, str] | None = None,
    layout: Mapping[Any, Any] | None = None,
    strict: bool = True,
    revision: str | None = None,
) -> dict[str, Adapter]:
    """Reads a PEFT adapter for a parameter tree: the merged weights are PEFT's.

    LoRA (linear, embedding, convolution, GPT-2's Conv1D; rsLoRA, DoRA, ranks and alphas by pattern, biases,
    saved modules, trained tokens, expert parameters), AdaLoRA, LoHa, LoKr and VeRA. ``inference_mode`` in the
    file freezes nothing.

    Args:
      path: the folder, or ``org/name`` of a repository on the Hub.
      params: the base; its leaves may be abstract unless the adapter has a ``lora_bias``.
      mapping: pairs of a module's name and a path of ours, see `lorax_fn.interop.mappings`; None is the names
        themselves, for trees made from a torch state dict.
      layout: as in `lorax_fn.split`.
      strict: False leaves out what is missing or unexpected in the file.
      revision: branch, tag or commit on the Hub.

    Returns:
      ``{path: Adapter}`` in the tree's order; arrays keep the file's dtype.

    Raises:
      LoraError: a file is damaged, a pickle, or of an unknown kind; keys are missing, unexpected or of wrong
        shapes (all are listed, with the nearest names); or the config asks for something that is not
        implemented here.

    Example:
      >>> import tempfile, jax.numpy as jnp, lorax_fn as lx
      >>> params = {"q_proj.weight": jnp.ones((6, 8))}
      >>> _, lora = lx.split(params, rank=2)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     lx.peft.save(folder, lora)
      ...     lx.peft.load(folder, params)["q_proj.weight"].a.shape
      (8, 2)
    """
    folder = local_folder(path, (CONFIG, TENSORS), revision)
    facts = config(folder)
    check_config(facts, folder / CONFIG, strict)
    if not (folder / TENSORS).is_file() and (folder / PICKLE).is_file():
        refuse_pickle(folder / PICKLE)
    tensors = read_tensors(folder / TENSORS)
    leaves, places = known(params, mapping, layout)
    _check_conv1d(facts, tensors, leaves, layout, mapping)
    return on_device(Reading(facts, places, leaves, strict).run(tensors))


def save(
    path: str | os.PathLike[str],
    lora: dict[str, Adapter],
    *,
    params: PyTree = None,
    mapping: Mapping[str, str] | None = None,
    base_model: str | None = None,
    target: str = "peft",
    config: Mapping[str, Any] | None = None,
    max_lora_rank: int | None = None,
) -> None:
    """Writes adapters as PEFT does: config, tensors and a model card.

    Args:
      path: the folder, made where it is missing.
      lora: ``{path: Adapter}``; for inits that took a part of W, what `lorax_fn.ranks.to_plain` returns.
      params: the base, abstract or not. With it, target modules are given by the ends of their names where
        these are unambiguous, and convolutions and embeddings are recognized by their leaves.
      mapping: as in `load`.
      base_model: the name of the base model, for the config and the card.
      target: ``"peft"``; ``"vllm"`` or ``"sglang"`` also checks what the server would refuse.
      config: other fields of a config, as `config` reads them: kept as they are.
      max_lora_rank: the server's limit, for ``"vllm"`` and ``"sglang"``; ranks are padded with exact zeros to
        the next that the server takes.

    Raises:
      LoraError: an adapter cannot be expressed in the file, the mapping lacks a leaf, or the server would
        refuse the file.

    Example:
      >>> import json, pathlib, tempfile, jax.numpy as jnp, lorax_fn as lx
      >>> _, lora = lx.split({"q_proj.weight": jnp.ones((6, 8))}, rank=2)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     lx.peft.save(folder, lora, base_model="org/base")
      ...     json.loads((pathlib.Path(folder) / "adapter_config.json").read_text())["lora_alpha"]
      32
    """
    folder = pathlib.Path(path)
    check_adapters(lora)
    check_target(target, max_lora_rank)
    if not lora:
        raise error("there is no adapter to save.", path=folder, do="params, lora = lx.split(params).")
    lost = [name for name, x in lora.items() if not is_concrete(x)]
    if lost:
        raise error("abstract adapters have no numbers to save.", path=lost, do="split concrete params.")
    leaves, places = known_by_adapters(params, lora, mapping)
    if params is not None:
        check_fits(dict(flatten_with_paths(params)[0]), lora)
    lora = for_server(lora, target, max_lora_rank, leaves, places)
    writing = Writing(lora, places, leaves, params is not None)
    tensors, facts = writing.run()
    if target != "peft":
        facts["target_modules"] = sorted({name.rpartition(".")[2] for name in facts["target_modules"]})
    facts = with_others(facts, config or {}, writing.modules, places, params is not None)
    if base_model is not None:
        facts["base_model_name_or_path"] = base_model
    write_tensors(folder / TENSORS, tensors, {"format": "pt"})
    write_json(folder / CONFIG, facts)
    write_text(folder / "README.md", model_card(facts, tensors))


def config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads an ``adapter_config.json``, all of its fields.

    Args:
      path: the adapter's folder.

    Returns:
      The fields as they stand there.

    Example:
      >>> import tempfile, jax.numpy as jnp, lorax_fn as lx
      >>> _, lora = lx.split({"q_proj.weight": jnp.ones((6, 8))}, rank=2)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     lx.peft.save(folder, lora, config={"task_type": "CAUSAL_LM"})
      ...     lx.peft.config(folder)["task_type"]
      'CAUSAL_LM'
    """
    return read_json(pathlib.Path(path) / CONFIG)


def push(
    path: str | os.PathLike[str], repo: str, *, private: bool = True, revision: str | None = None
) -> str:
    """Uploads the folder of an adapter to the Hub; the token is that of ``huggingface_hub``.

    Args:
      path: the folder that `save` wrote.
      repo: ``org/name``; made where it is missing.
      private: whether a new repository is private.
      revision: the branch to write to.

    Returns:
      The address of the commit.

    Raises:
      LoraError: there is no adapter at ``path``, or the Hub refuses.

    Example:
      >>> import lorax_fn as lx
      >>> try:
      ...     lx.peft.push("nowhere", "org/name")
      ... except lx.LoraError as failure:
      ...     print(str(failure).splitlines()[0])
      this file cannot be read.
    """
    folder = pathlib.Path(path)
    check_config(config(folder), folder / CONFIG, strict=False)
    return upload(folder, repo, (CONFIG, TENSORS, "README.md"), private, revision)


def _check_conv1d(
    facts: Mapping[str, Any], tensors: Mapping[str, Any], leaves: Leaves, layout: Any, mapping: Any
) -> None:
    """Corrects the layouts of GPT-2's (in, out) weights in a tree of torch's names, where that is certain."""
    from lorax_fn.interop.conv1d import turn_conv1d

    if mapping is None and alpha_name(facts) == "lora_alpha" and facts.get("fan_in_fan_out"):
        turn_conv1d(tensors, leaves, layout)
