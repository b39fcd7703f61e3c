"""`quantize` stores the weights of a tree in 4 or 8 bits, and `dequantize` turns them into arrays again."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lorax_fn.core.errors import error
from lorax_fn.core.layouts import Layout
from lorax_fn.core.stored import dense, is_stored
from lorax_fn.core.trees import PyTree, arrays, flatten_with_paths, is_concrete, replace_leaves, run
from lorax_fn.quantization.blocks import Quantized, encode
from lorax_fn.quantization.formats import check_options
from lorax_fn.targets.patterns import Patterns
from lorax_fn.targets.roles import choose, classify


def quantize(
    params: PyTree,
    format: str = "nf4",
    *,
    block: int = 64,
    double: bool = True,
    targets: Patterns = None,
    layout: Mapping[Any, Any] | None = None,
) -> PyTree:
    """Stores weights in 4 or 8 bits: ``w = value(code) * scale``, with one scale per block of inputs.

    Dettmers et al., "QLoRA" (https://arxiv.org/abs/2305.14314): NF4 (appendix E) and double quantization
    (section 3), in which the scales are themselves 8-bit codes. Leaves are quantized one at a time, to save
    memory.

    Args:
      params: any pytree; abstract leaves (`jax.ShapeDtypeStruct`) give a `Quantized` of abstract arrays.
      format: ``"nf4"``; or ``"int4"`` or ``"int8"``, the nearest of 15 or 255 evenly spaced values.
      block: how many weights along an input axis share a scale, an even number. A last block that is shorter
        has its own scale.
      double: whether scales are 8-bit codes, in groups of 256 along an output axis. nf4 then takes 4.13 bits
        per weight instead of 4.5.
      targets: as in `lorax_fn.split`; None is every linear weight: no embedding, norm or output head.
      layout: as in `lorax_fn.split`.

    Returns:
      The same tree with a `Quantized` for each weight; all other leaves are the same objects.

    Raises:
      LoraError: the format is unknown or the block odd; a weight is empty, not finite, not float or already
        quantized; or ``targets`` or ``layout`` is wrong, as in `lorax_fn.split`.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> params = lx.quantize({"kernel": jnp.ones((128, 64)), "bias": jnp.ones(64)})
      >>> params["kernel"].nbytes, params["bias"].nbytes, params["kernel"].dtype
      (4236, 256, dtype('float32'))
    """
    leaves, layouts = chosen(params, format, block, targets, layout)
    return replace_leaves(params, rounded(leaves, layouts, format, block, double))


def chosen(
    params: PyTree, format: str, block: int, targets: Any, layout: Mapping | None
) -> tuple[dict[str, Any], dict[str, Layout]]:
    """All leaves by path, and the layouts of the weights to quantize, after checks."""
    check_options(format, block)
    leaves = arrays(params)
    layouts, _ = choose(leaves, classify(params, layout), targets, None, None)
    _check_weights(leaves, layouts)
    return leaves, layouts


def rounded(
    leaves: Mapping[str, Any], layouts: Mapping[str, Layout], format: str, block: int, double: bool
) -> dict[str, Quantized]:
    """Each weight rounded to the nearest codes, by path."""
    made, strange = {}, []
    for path, axes in layouts.items():
        code = functools.partial(_encode, layout=axes, format=format, block=block, double=double)
        made[path], finite = run(code, leaves[path])
        if is_concrete(finite) and not bool(finite):  # reading it waits for this leaf
            strange.append(path)
    if strange:
        raise error(
            "weights that are not finite cannot be quantized.",
            path=strange,
            got="NaN or infinity, which would spoil a whole block",
            want="finite numbers",
            do="correct these weights, or name the others in targets=.",
        )
    return made


def dequantize(params: PyTree) -> PyTree:
    """Turns every quantized weight into an array of its shape and dtype.

    Args:
      params: any pytree; abstract quantized leaves give `jax.ShapeDtypeStruct`.

    Returns:
      The same tree of arrays; leaves that were not quantized are the same objects.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> params = {"kernel": jnp.ones((128, 64), jnp.bfloat16)}
      >>> bool((lx.dequantize(lx.quantize(params))["kernel"] == params["kernel"]).all())
      True
    """
    stored = {path: leaf for path, leaf in flatten_with_paths(params)[0] if is_stored(leaf)}
    return replace_leaves(params, {path: run(dense, leaf) for path, leaf in stored.items()})


@functools.partial(jax.jit, static_argnames=("layout", "format", "block", "double"))
def _encode(w: Any, layout: Layout, format: str, block: int, double: bool) -> tuple[Quantized, jax.Array]:
    w = jnp.asarray(w)
    return encode(w, layout, format, block, double), jnp.isfinite(w).all()


def _check_weights(leaves: Mapping[str, Any], layouts: Mapping[str, Layout]) -> None:
    wrong = {}
    for path, layout in layouts.items():
        leaf = leaves[path]
        if is_stored(leaf):
            wrong[path] = "quantized already"
        elif not math.prod(leaf.shape):
            wrong[path] = f"{tuple(leaf.shape)}: empty"
        elif not (layout.inputs and layout.outputs):
            wrong[path] = f"{layout}: no input or no output axis"
    if wrong:
        raise error(
            "these weights cannot be quantized.",
            path=list(wrong),
            got=list(wrong.values()),
            want="float arrays with an input and an output axis",
            do="name the others in targets=, or lx.dequantize(params) first.",
        )
