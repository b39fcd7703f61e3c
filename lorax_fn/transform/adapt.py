"""`adapt`: the unchanged function, run on frozen weights and adapters."""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import jax

from lorax_fn.core.errors import error
from lorax_fn.core.fitting import check_fits
from lorax_fn.core.trees import flatten_with_paths
from lorax_fn.transform.factored import is_factored, wrap
from lorax_fn.transform.mutations import Watched, unchanged, write_back
from lorax_fn.transform.traces import Leaves, Traces, check_argnum
from lorax_fn.transform.walk import Walk

FALLBACKS = ("warn", "error", "allow")


def adapt(fn: Callable[..., Any], *, argnum: int = 0, fallback: str = "warn") -> Callable[..., Any]:
    """Turns a function of ``(params, ...)`` into one of ``(params, lora, ...)``, without modifying it.

    Wherever ``fn`` uses an adapted weight ``W``, the result computes with ``W + scale * A @ B`` in its
    factored form, ``x @ W + scale * (x @ A) @ B`` (equation 3 of Hu et al.,
    https://arxiv.org/abs/2106.09685). Neither ``W + AB`` nor, in the gradient with respect to ``lora``, a
    cotangent of ``W`` is ever built. As under `jax.jit`, ``fn`` is traced once per set of argument types, and
    what it closes over is read, and what it prints is printed, only at that time: a number, array or
    attribute that changes afterwards is not seen, even in eager calls, so pass such things as arguments.
    Arrays and Python floats are traced, except that a float which ``fn`` needs as a number, as in
    ``if rate > 0``, is static. Bools, integers, strings and callables are static, and so is every leaf of
    ``params`` that is not an array.

    It works inside and around every JAX transformation. Called eagerly, it runs operation by operation. What
    ``fn`` writes into Variables of a Flax NNX module is written into the module that was passed, as in an
    unadapted call.

    No gradient is stopped: the gradient with respect to ``params`` is that of the merged function. With
    ``argnums=1`` (the adapters alone), `jax.grad` computes no gradient of the base.

    Args:
      fn: any JAX function; its argument ``argnum`` is the parameter tree.
      argnum: position of the parameters in ``fn``; the result takes the adapters right after it.
      fallback: what happens where an operation has no rule and the whole weight must be built: ``"warn"``
        (once per weight and operation), ``"error"`` or ``"allow"``. Values are correct in every case. There
        is no rule for functions of a weight's entries (``sin(w)``), for reshapes and masks that mix its
        inputs and outputs, or for a weight that is passed to a ``custom_vjp``, changed by a loop, or returned
        by ``shard_map``, by ``fn``, or by branches of which one transposes it.

    Returns:
      ``fn2`` with ``fn``'s signature and ``lora`` inserted after argument ``argnum``;
      ``fn2(params, {}, ...)`` is ``fn(params, ...)``.

    Raises:
      LoraError: ``argnum`` or ``fallback`` is invalid; or, when the result is called, ``lora`` does not fit
        ``params``, or a weight has to be built under ``fallback="error"``.

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
    check_argnum(argnum)
    return Adapted(fn, argnum, fallback)


class Adapted:
    """What `adapt` returns: a function of ``(params, lora, ...)`` that can be pickled if ``fn`` can."""

    def __init__(self, fn: Callable, argnum: int, fallback: str):
        functools.update_wrapper(self, fn)
        # jax.jit resolves static_argnames by the signature, so it must be the one that includes lora.
        del self.__dict__["__wrapped__"]
        signature = _with_lora(fn, argnum)
        if signature is not None:
            self.__signature__ = signature
        self._made_of = fn, argnum, fallback
        self._walk, self._traces = Walk(fallback), Traces(fn)

    def __reduce__(self):
        fn, argnum, fallback = self._made_of
        return Adapted, (fn, argnum, fallback)

    def __repr__(self) -> str:
        return f"lx.adapt({self._made_of[0]!r})"

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)  # like a function in a class

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        fn, argnum, _ = self._made_of
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
        if lora is None:
            raise error(
                "lora is None.",
                got="None",
                want="{path: Adapter}",
                do="pass {} where nothing is adapted: fn2(params, {}, ...) is fn(params, ...).",
            )
        check_fits(dict(named), lora)
        # Each adapted leaf becomes base and factors; methods that have no factors (rows, whole weights) give
        # their own array.
        leaves = [wrap(path, leaf, lora.get(path)) for path, leaf in named]
        adapted = [old for leaf, (_, old) in zip(leaves, named, strict=True) if leaf is not old]
        if not adapted:
            return fn(*args, **kwargs)
        # Nothing is factored: the function itself runs on the adapted arrays, with no trace at all.
        if not any(is_factored(leaf) for leaf in leaves):
            given = jax.tree_util.tree_unflatten(treedef, leaves)
            watched = Watched(given)
            results = fn(*args[:argnum], given, *args[argnum + 1 :], **kwargs)
            write_back(watched.changes(), params, adapted)
            return results
        # The program is traced on the types of W alone. The adapters are not part of it, so another adapter
        # causes no new trace.
        trace = self._traces.of((*args[:argnum], Leaves(leaves, treedef), *args[argnum + 1 :]), kwargs)
        walk = self._walk.call()
        flat = walk.evaluate(trace.jaxpr, trace.consts, trace.values)
        # A value that an NNX layer writes back into its Variable as it was does not count as a change.
        given = [
            value if slot is None else named[slot][1]
            for value, slot in zip(trace.values, trace.slots, strict=True)
        ]
        for place in unchanged(trace, given, (args, kwargs)):
            flat[place] = None
        results, changes = jax.tree_util.tree_unflatten(trace.out_tree, walk.returned(flat))
        write_back(changes, (args, kwargs), adapted)
        return results


def _with_lora(fn: Callable, argnum: int) -> inspect.Signature | None:
    """``fn``'s signature with ``lora`` after argument ``argnum``; None if it cannot be placed there."""
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
