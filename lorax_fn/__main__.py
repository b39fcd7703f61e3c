"""The command ``python -m lorax_fn inspect|merge|convert|diff|combine PATH...``, also called ``lorax-fn``."""

import json
import pathlib
import shutil
import sys
from collections.abc import Iterable
from typing import Annotated, Any

try:
    import rich.console
    import rich.progress
    import rich.table
    import typer
except ImportError as missing:
    sys.exit(f"The command needs another package ({missing.name}): pip install 'lorax_fn[cli]'")

import jax
import jax.numpy as jnp
import numpy as np

import lorax_fn as lx
from lorax_fn.core.matrices import factor_entries
from lorax_fn.interop import anything
from lorax_fn.interop.checkpoints import open_checkpoint
from lorax_fn.methods.low_rank import LowRank

app = typer.Typer(
    help="Looks at LoRA adapters and converts, combines and merges them: of lorax_fn, PEFT and Kohya.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Out = Annotated[pathlib.Path, typer.Option("--out", "-o", help="Where the result goes; must not exist yet.")]
Base = Annotated[
    str | None,
    typer.Option(help="A checkpoint of the base, by whose names and shapes adapters are read."),
]
ROW = ("path", "dtype", "shape", "method", "numbers", "rank", "alpha", "scale", "norm", "values")


@app.command()
def inspect(
    paths: Annotated[list[str], typer.Argument(help="Adapters or checkpoints.")],
    base: Base = None,
    as_json: AsJson = False,
) -> None:
    """Shows what is in adapters: config, methods, ranks, norms and the largest singular values."""
    found = []
    params = _weights(base, as_json)
    for path in _progress(paths, "reading", as_json):
        kind = anything.kind_of(path)
        facts: dict[str, Any] = {"path": path, "kind": kind}
        if kind == "checkpoint":
            with anything.tensors_of(path) as table:
                facts["tensors"] = {name: [table.dtype(name), *table.shape(name)] for name in table}
        else:
            facts["config"] = lx.peft.config(path) if kind == "peft" else None
            facts["adapters"] = [_row(name, x) for name, x in _read(path, params).items()]
        found.append(facts)
    if as_json:
        print(json.dumps(found))
        return
    console = rich.console.Console()
    for facts in found:
        console.print(f"{facts['path']}: {facts['kind']}")
        for name, value in (facts.get("config") or {}).items():
            if value not in (None, False, [], {}):
                console.print(f"  {name}: {value}", markup=False, highlight=False)
        rows = facts.get("adapters") or [
            {"path": n, "dtype": x[0], "shape": x[1:]} for n, x in facts.get("tensors", {}).items()
        ]
        console.print(_table(rows))


@app.command()
def merge(
    base: Annotated[
        str, typer.Argument(help="A folder with model.safetensors, or with shards and their index.")
    ],
    adapters: Annotated[
        list[str], typer.Argument(help="PEFT adapters of that base, merged one after the other.")
    ],
    out: Out,
    as_json: AsJson = False,
) -> None:
    """Merges PEFT adapters into the weights of a checkpoint and writes another checkpoint."""
    _free(out)
    params = _weights(base, as_json) or {}
    for path in adapters:
        params = lx.merge(params, lx.peft.load(path, params))
    lx.huggingface.save(out, params)
    for file in sorted(pathlib.Path(base).iterdir()):
        if file.suffix in (".json", ".txt", ".model", ".jinja") and not file.name.endswith(".index.json"):
            shutil.copyfile(file, out / file.name)
    _done({"out": str(out), "tensors": len(params), "adapters": adapters}, as_json)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="An adapter of lorax_fn, PEFT or Kohya.")],
    out: Out,
    to: Annotated[str, typer.Option(help="peft, orbax or kohya.")],
    base: Base = None,
    component: Annotated[str | None, typer.Option(help="Of a Kohya file: unet, text_encoder, ...")] = None,
    as_json: AsJson = False,
) -> None:
    """Writes an adapter in the form of another program."""
    if to not in ("peft", "orbax", "kohya"):
        raise typer.BadParameter(f"{to!r} is not one of peft, orbax, kohya", param_hint="--to")
    _free(out)
    params = _weights(base, as_json)
    lora = _read(source, params, component)
    if to == "peft":
        lx.peft.save(out, lora, params=params)
    elif to == "orbax":
        lx.checkpoint.save(out, lora)
    else:
        lx.kohya.save(out, lora, component=component or "unet", params=params)
    _done({"out": str(out), "to": to, "adapters": len(lora)}, as_json)


@app.command()
def diff(
    one: Annotated[str, typer.Argument(help="An adapter.")],
    other: Annotated[str, typer.Argument(help="Another.")],
    base: Base = None,
    as_json: AsJson = False,
) -> None:
    """Compares two adapters change by change. Exit code 1 where they differ."""
    params = _weights(base, as_json)
    a, b = _read(one, params), _read(other, params)
    rows = []
    for path in sorted(a.keys() | b.keys()):
        if path not in a or path not in b:
            rows.append({"path": path, "difference": f"only in {one if path in a else other}"})
            continue
        x, y = _change(a[path]), _change(b[path])
        if x is None or y is None or x.shape != y.shape or type(a[path]) is not type(b[path]):
            same = _same(a[path], b[path])
            rows.append({"path": path, "difference": 0.0 if same else "another method, shape or value"})
        else:
            size = float(np.linalg.norm(x))
            rows.append(
                {"path": path, "difference": float(np.linalg.norm(x - y)) / (size or 1.0), "norm": size}
            )
    differ = any(row["difference"] != 0.0 for row in rows)
    if as_json:
        print(json.dumps({"differ": differ, "adapters": rows}))
    else:
        rich.console.Console().print(_table(rows))
    raise typer.Exit(1 if differ else 0)


@app.command()
def combine(
    adapters: Annotated[list[str], typer.Argument(help="LoRA adapters, each a path or path:weight.")],
    out: Out,
    base: Base = None,
    as_json: AsJson = False,
) -> None:
    """Adds adapters with weights, exactly, at the sum of their ranks; writes a PEFT adapter."""
    _free(out)
    weighted = [_weighted(text) for text in adapters]
    params = _weights(base, as_json)
    loras = [(weight, _read(path, params)) for weight, path in _progress(weighted, "reading", as_json)]
    made = lx.combine(loras)
    lx.peft.save(out, made, params=params)
    _done({"out": str(out), "adapters": len(made), "of": [f"{w:g}:{p}" for w, p in weighted]}, as_json)


# --- parts


def _read(path: str, params: dict[str, Any] | None, component: str | None = None) -> dict[str, Any]:
    """The adapters at a path, by the base's names and shapes where there is a base."""
    kind = anything.kind_of(path)
    if params is None or kind not in ("peft", "kohya"):
        return anything.read(path, component)
    if kind == "peft":
        return lx.peft.load(path, params)
    return lx.kohya.load(path, params, component=component or anything.components_of(path)[0])


def _weights(base: str | None, quiet: bool) -> dict[str, Any] | None:
    if base is None:
        return None
    with open_checkpoint(pathlib.Path(base)) as table:
        return {name: jnp.array(table[name]) for name in _progress(list(table), "weights", quiet)}


def _row(path: str, adapter: Any) -> dict[str, Any]:
    count = sum(x.size for x in jax.tree.leaves(adapter) if hasattr(x, "size"))
    row: dict[str, Any] = {"path": path, "method": type(adapter).__name__, "numbers": count}
    for name in ("rank", "alpha", "scale"):
        value = getattr(adapter, name, None)
        row[name] = np.asarray(value).tolist() if value is not None else None
    if isinstance(adapter, LowRank) and adapter.layout.ndim == 2:
        a, b, scale = factor_entries(adapter)
        left, right = np.linalg.qr(np.asarray(a[0]))[1], np.linalg.qr(np.asarray(b[0]).T)[1]
        values = np.linalg.svd(left * np.asarray(scale[0])[None] @ right.T, compute_uv=False)
        row |= {"norm": float(np.linalg.norm(values)), "values": [float(x) for x in values[:4]]}
    else:
        change = _change(adapter)
        row["norm"] = None if change is None else float(np.linalg.norm(change))
    return row


def _change(adapter: Any) -> np.ndarray | None:
    change = lx.delta({"x": adapter}).get("x")
    return None if change is None else np.asarray(change)


def _same(x: Any, y: Any) -> bool:
    if jax.tree.structure(x) != jax.tree.structure(y):
        return False
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))


def _weighted(text: str) -> tuple[float, str]:
    path, colon, weight = text.rpartition(":")
    try:
        return (float(weight), path) if colon else (1.0, text)
    except ValueError:
        return 1.0, text


def _free(out: pathlib.Path) -> None:
    if out.exists():
        raise lx.LoraError(f"this path exists already, and nothing was overwritten.\n  path:    {out}")


def _progress(items: list, what: str, quiet: bool) -> Iterable:
    """A bar on standard error where that is a terminal and there is something to wait for."""
    console = rich.console.Console(stderr=True)
    if quiet or len(items) < 2 or not console.is_terminal:
        return items
    return rich.progress.track(items, what, console=console, transient=True)


def _table(rows: list[dict[str, Any]]) -> Any:
    names = [name for name in (*ROW, "difference") if any(name in row for row in rows)]
    table = rich.table.Table(*names)
    for row in rows:
        table.add_row(*(_text(row.get(name)) for name in names))
    return table


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_text, value))
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _done(facts: dict[str, Any], as_json: bool) -> None:
    print(json.dumps(facts) if as_json else f"wrote {facts['out']}")


def main() -> None:
    """Runs the command; a mistake of the user's is one message and exit code 2."""
    try:
        app()
    except lx.LoraError as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
