"""The figures that `benchmarks/guards.py` compares: what grew is told, and what is committed is whole."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))  # scripts, not a package

import guards
import results


def test_a_figure_that_grew_by_more_than_two_percent_is_told():
    committed = {"step": {"flops": 1000.0, "lines": 50}, "split": {"compilations": 4}}
    assert guards.grown(committed, committed) == []
    assert guards.grown({**committed, "step": {"flops": 1020.0, "lines": 40}}, committed) == []
    found = {**committed, "step": {"flops": 1021.0, "lines": 50}}
    assert guards.grown(found, committed) == ["step, flops: 1021, committed 1000"]
    one_more = {**committed, "split": {"compilations": 5}}
    assert guards.grown(one_more, committed) == ["split, compilations: 5, committed 4"]


def test_a_figure_that_only_one_side_has_is_told():
    committed = {"step": {"flops": 1000.0}}
    assert guards.grown({"step": {}}, committed) == ["step, flops: not measured"]
    assert guards.grown({"step": {"flops": 1000.0, "lines": 1}}, committed) == ["step, lines: not committed"]


def test_every_case_has_committed_figures():
    committed = results.load("guards")
    assert committed
    for version, cases in committed.items():
        assert set(cases) == set(guards.CASES), version


def test_what_is_committed_of_one_step_is_what_it_costs_here():
    """One case of `guards.py --check`, but with the machine code of the tests, which these figures ignore."""
    import jax

    committed = results.load("guards").get(jax.__version__)
    if committed is None:
        return
    name = "lx.adapt"
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = guards.CASES[name]()
    assert guards.grown({name: found}, {name: committed[name]}) == []
