"""`adapt`: the unchanged function, run on frozen weights and adapters."""

import functools
import inspect
from collections.abc import Callable

import jax

from lorax_fn.core.errors import error
from lorax_fn.core.fitting import check_fits
from lorax_fn.core.trees import flatten_with_paths
from lorax_fn.transform.factored import is_factored, wrap
from lorax_fn.transform.traces import Leaves, Traces
from lorax_fn.transform.walk import Walk

FALLBACKS = ("warn", "error", "allow")


def adapt(fn: Callable, *, argnum: int = 0, fallback: str = "warn") -> Callable:
    """Makes a function of ``(params, ...)`` one of ``(params, lora, ...)``, without touching it.

    Wherever ``fn`` uses an adapted weight ``W``, the result computes with ``W + scale * A @ B`` in its
    factored form, ``x @ W + scale * (x @ A) @ B`` (equation 3 of Hu et al.,
    https://arxiv.org/abs/2106.09685). Neither ``W + AB`` nor, in the gradient by ``lora``, a cotangent of
    ``W`` is ever built. The function is traced once a set of argument types, as `jax.jit` does; arrays are
    traced, everything else (bools, strings, numbers, callables) is static. It works under and over every
    JAX transformation. Called eagerly, it runs operation by operation.

    No gradient is stopped: ``jax.grad`` by ``params`` is that of the merged function. Differentiate by
    ``argnums=1``, the adapters, and the base costs nothing.

    Args:
      fn: any JAX function; its argument ``argnum`` is the parameter tree.
      argnum: position of the parameters in ``fn``; the result takes the adapters right after it.
      fallback: what happens where an operation has no rule and the whole weight must be built: ``"warn"``
        (once a weight and operation), ``"error"`` or ``"allow"``. Values are right in every case. Without a
        rule are functions of a weight's entries (``sin(w)``), reshapes that mix its inputs and outputs, and a
        weight given to a ``custom_vjp``, changed by a loop, or returned by a branch, ``shard_map`` or ``fn``.

    Returns:
      ``fn2`` with ``fn``'s signature and ``lora`` inserted after argument ``argnum``;
      ``fn2(params, {}, ...)`` is ``fn(params, ...)``.

    Raises:
      LoraError: at the call, where ``lora`` does not fit ``params``, or under ``fallback="error"``.

    Example:
      >>> import jax.numpy as jnp, lorax_fn as lx
      >>> params = {"dense": {"kernel": jnp.ones((3, 2))}}
      >>> params, lora = lx.split(params, rank=1)
      >>> apply = lx.adapt(lambda params, x: x @ params["dense"]["kernel"])
      >>> apply(params, lora, jnp.ones((1, 3)))
      Array([[3., 3.]], dtype=float32)
    """
    if fallback not in FALLBACKS:
        raise error(f"unknown fallback {fallback!r}.", want=FALLBACKS, do="pass one of them.")
    walk = Walk(fallback)
    traces = Traces(fn)

    @functools.wraps(fn)
    def adapted(*args, **kwargs):
        if len(args) < argnum + 2:
            raise error(
                "the adapters are missing from the call.",
                got=f"{len(args)} positional arguments",
                want=f"params as argument {argnum} and lora as argument {argnum + 1}, both positional",
                do="call fn2(params, lora, ...).",
            )
        params, lora = args[argnum], args[argnum + 1]
        args = (*args[: argnum + 1], *args[argnum + 2 :])
        named, treedef = flatten_with_paths(params)
        check_fits(dict(named), lora)
        leaves = [wrap(path, leaf, lora.get(path)) for path, leaf in named]
        if not any(is_factored(leaf) for leaf in leaves):
            params = jax.tree_util.tree_unflatten(treedef, leaves)
            return fn(*args[:argnum], params, *args[argnum + 1 :], **kwargs)
        trace = traces.of((*args[:argnum], Leaves(leaves, treedef), *args[argnum + 1 :]), kwargs)
        results = walk.returned(walk.evaluate(trace.jaxpr, trace.consts, trace.values))
        return jax.tree_util.tree_unflatten(trace.out_tree, results)

    # jax.jit reads the signature for static_argnames: it must be that of the function with lora in it.
    del adapted.__wrapped__
    signature = _with_lora(fn, argnum)
    if signature is not None:
        adapted.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue]
    return adapted


def _with_lora(fn: Callable, argnum: int) -> inspect.Signature | None:
    """``fn``'s signature with ``lora`` after argument ``argnum``; None where that has no place in it."""
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # some callables have none
        return None
    parameters = list(signature.parameters.values())
    if argnum >= len(parameters) or parameters[argnum].kind not in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    ):
        return None
    name = "lora"
    while name in signature.parameters:
        name = "new_" + name
    before = parameters[argnum]
    return signature.replace(
        parameters=[*parameters[: argnum + 1], before.replace(name=name), *parameters[argnum + 1 :]]
    )
