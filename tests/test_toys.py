"""A new method is one class and one row, a new init one value and one row: toys of both pass all laws."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import test_init_laws
import test_methods

import lorax_fn as lx
from lorax_fn.core.adapters import Factors, fact, number, register
from lorax_fn.core.layouts import Layout
from lorax_fn.inits.base import Init
from lorax_fn.inits.plain import factor_shapes
from lorax_fn.inits.table import INITS
from lorax_fn.methods.low_rank import LowRank, scale_of
from lorax_fn.methods.table import METHODS


@register
class Gated(LowRank):
    """``dW = scale * A diag(g) B``: LoRA with a trained gate per rank."""

    up = ("b",)
    a: Any
    b: Any
    gate: Any
    alpha: Any = number()
    rank: int = fact()
    scaling: str = fact()
    layout: Layout = fact()
    key: Any = None
    rate: Any = number(default=0.0)

    @classmethod
    def create(cls, w, start):
        scale = scale_of(start.alpha, start.rank, start.scaling, ())
        a, b, frozen = start.init(start.key, w, start.layout, start.rank, scale, start.dtype)
        gate = jnp.ones(start.rank, start.dtype)
        return cls(a, b, gate, start.alpha, start.rank, start.scaling, start.layout), frozen

    @property
    def scale(self):
        return scale_of(self.alpha, self.rank, self.scaling, ())

    @property
    def shape(self):
        return self.shape_of(self.a, self.b)

    def axes(self):
        a, b = self.factor_axes()
        return {"a": a, "b": b, "gate": (None,)}

    def pair(self):
        return Factors(
            self.a * self.gate.reshape((1,) * (self.a.ndim - 1) + (-1,)), self.b, self.layout, self.scale
        )


@dataclasses.dataclass(frozen=True, repr=False)
class Ones(Init):
    """``A = 1 / n``, ``B = 0``."""

    name = "ones"

    def __call__(self, key, w, layout, rank, scale, dtype):
        shape_a, shape_b = factor_shapes(w.shape, layout, rank)
        return jnp.full(shape_a, 1.0 / w.size, dtype), jnp.zeros(shape_b, dtype), w


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    """The two rows, in the package's tables and in those of the contract tests."""
    monkeypatch.setitem(METHODS, "gated", Gated)
    monkeypatch.setitem(test_methods.ROWS, "gated", {"method": "gated"})
    monkeypatch.setitem(INITS, "ones", Ones())
    monkeypatch.setitem(test_init_laws.ROWS, "ones", "ones")
    monkeypatch.setattr(test_methods, "ADDITIVE", [*test_methods.ADDITIVE, "gated"])
    monkeypatch.setattr(test_methods, "EXACT_AT_INIT", [*test_methods.EXACT_AT_INIT, "gated"])
    monkeypatch.setattr(test_init_laws, "B_IS_ZERO", (*test_init_laws.B_IS_ZERO, "ones"))


def laws(module, row):
    """Every test of a module that runs once per row of its table, as (id, function, other arguments)."""
    found = []
    for name, test in vars(module).items():
        marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
        if name.startswith("test_") and any(mark.args[0] == "name" for mark in marks):
            values = [{"name": row}]
            for mark in marks:
                if mark.args[0] != "name":
                    values = [{**v, mark.args[0]: x} for v in values for x in mark.args[1]]
            found += [pytest.param(test, v, id="-".join([name, *map(str, v.values())])) for v in values]
    return found


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("law", "arguments"), laws(test_methods, "gated") + laws(test_init_laws, "ones"))
def test_a_toy_keeps_the_law(law, arguments, tmp_path):
    names = law.__code__.co_varnames[: law.__code__.co_argcount]
    law(**arguments, **({"tmp_path": tmp_path} if "tmp_path" in names else {}))


def test_toys_go_through_split_by_name():
    _, lora = lx.split({"kernel": jnp.ones((8, 6))}, rank=2, method="gated", init="ones")
    assert repr(lora["kernel"]) == "Gated(a=f32[8,2], b=f32[2,6], gate=f32[2], rank=2, alpha=32.0, scale=16)"
    assert lora["kernel"].count() == 8 * 2 + 2 * 6 + 2
    dropped = lx.dropout(lora, 0.5, jax.random.key(0))
    assert dropped["kernel"].under_dropout
