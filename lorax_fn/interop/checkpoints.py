"""A folder of safetensors files as one table of tensors: one file, or shards with an index."""

import contextlib
import pathlib
import re
from collections.abc import Iterator

import numpy as np

from lorax_fn.core.errors import error
from lorax_fn.interop.files import PICKLES, Tensors, open_tensors, read_json, refuse_pickle, unreadable

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
_FILE = re.compile(r"[\w][\w.-]*\.safetensors")


class Table:
    """Tensors by name, whichever file each lies in; none is read before it is asked for."""

    def __init__(self, files: dict[str, Tensors]):
        self._file = {name: tensors for tensors in files.values() for name in tensors.names}

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __contains__(self, name: object) -> bool:
        return name in self._file

    def __getitem__(self, name: str) -> np.ndarray:
        return self._file[name][name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file[name].shape(name)

    def dtype(self, name: str) -> str:
        return self._file[name].dtype(name)


@contextlib.contextmanager
def open_checkpoint(folder: pathlib.Path) -> Iterator[Table]:
    """Opens every file of a checkpoint.

    Raises:
      LoraError: there is none, only pickles, or the index does not agree with its files.
    """
    names, index = _files(folder)
    with contextlib.ExitStack() as stack:
        opened = {name: stack.enter_context(open_tensors(folder / name)) for name in names}
        if index is not None:
            _check_index(folder / INDEX, index, opened)
        seen: dict[str, str] = {}
        for file, tensors in opened.items():
            for name in tensors.names:
                if name in seen:
                    raise unreadable(folder, f"{name} is in {seen[name]} and in {file}")
                seen[name] = file
        yield Table(opened)


def _files(folder: pathlib.Path) -> tuple[list[str], dict[str, str] | None]:
    if not folder.is_dir():
        raise unreadable(folder, "no such folder", "check the path.")
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise unreadable(folder / INDEX, "no weight_map in it")
        names = sorted({str(name) for name in index.values()})
        strange = [name for name in names if not _FILE.fullmatch(name)]
        if strange:  # "../x", "/etc/x": a name that leads out of the folder
            raise unreadable(folder / INDEX, f"names of files that are not plain: {strange[:4]}")
        return names, index
    if (folder / ONE).is_file():
        return [ONE], None
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(others) == 1:
        return others, None
    if not others:
        for path in sorted(folder.iterdir()):
            if path.suffix in PICKLES:
                refuse_pickle(path)
    raise error(
        "there is no checkpoint in this folder.",
        path=folder,
        got=others or "no .safetensors file",
        want=f"{ONE}, or {INDEX} and its shards",
        do="check the path.",
    )


def _check_index(path: pathlib.Path, index: dict[str, str], opened: dict[str, Tensors]) -> None:
    wrong = [name for name, file in index.items() if name not in set(opened[str(file)].names)]
    if wrong:
        raise error(
            "the index names tensors that its files do not hold.",
            path=path,
            got=wrong[:8],
            do="fetch the checkpoint again.",
        )
