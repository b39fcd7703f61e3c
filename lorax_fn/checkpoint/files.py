"""Files of a checkpoint: only regular files inside it are read, and all are checked before they are used.

Three kinds of checksums protect a checkpoint. The JSON contains the size and crc32 of each file and its own
crc32. A sha256 of the JSON is stored among the arrays (``facts.sha256``), so that edited JSON, or the JSON of
another checkpoint, is detected. This guards against accidents and mistakes, not against attackers: whoever
can write to the directory can also write matching checksums.
"""

import hashlib
import json
import os
import pathlib
import re
import shutil
import stat
import time
import zlib
from typing import Any

from lorax_fn.core.errors import LoraError, error

SEAL = "facts.sha256"
FACTS_LIMIT = 64 << 20  # bytes of JSON that are read
CHUNK = 1 << 20


class DamagedError(LoraError):
    """A part of a checkpoint is missing or was changed."""


def damaged(path: Any, got: Any, do: str = "") -> DamagedError:
    """The error for a checkpoint that is not as it was written."""
    do = do or "restore the directory from a copy, or save the adapters again."
    return DamagedError(str(error("the checkpoint is damaged.", path=path, got=got, do=do)))


def local(path: str | os.PathLike, *, write: bool = False) -> pathlib.Path:
    """The absolute path of a directory with links resolved; remote addresses are refused.

    To ``write``, names that Orbax takes for patterns or addresses are refused too: it would lose arrays.
    """
    text = os.fspath(path)
    if not isinstance(text, str) or "\0" in text:
        raise error(
            "this is not the path of a directory.", got=repr(text), do="pass a str or a pathlib.Path."
        )
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        raise error(
            "checkpoints must be on a local file system.",
            path=text,
            got="the address of a remote store",
            want="a directory on this machine, such as a mounted bucket",
            do="pass a local directory and copy it there afterwards.",
        )
    found = pathlib.Path(os.path.realpath(text))
    odd = [part for part in found.parts if re.search(r"[*?\[\\]", part) or part == "gs:"]
    if odd and write:
        raise error(
            "Orbax can't write below a directory of this name.",
            path=found,
            got=[repr(part) for part in odd],
            want="a name without * ? [ or a backslash, other than gs:",
            do="choose another name.",
        )
    return found


def unwritable(path: pathlib.Path, failure: BaseException, do: str) -> LoraError:
    """The error for a directory or disk that can't be written to."""
    return error(
        "a checkpoint could not be written.",
        path=path,
        got=f"{type(failure).__name__}: {str(failure)[-500:]}",
        do=do,
    )


def file_sums(folder: pathlib.Path) -> dict[str, dict]:
    """``{name: {size, crc32}}`` for every regular file below ``folder``."""
    found = {}
    for root, _, names in os.walk(folder):
        for name in sorted(names):
            file = pathlib.Path(root, name)
            if stat.S_ISREG(file.lstat().st_mode):
                found[file.relative_to(folder).as_posix()] = {
                    "size": file.stat().st_size,
                    "crc32": _crc_of(file),
                }
    return found


def check_files(folder: pathlib.Path, sums: dict[str, Any]) -> None:
    """Raises a `LoraError` that names every file that is missing, changed, or reached through a link.

    This runs before Orbax, which leaves broken event loops behind when several reads fail at once. Files that
    ``sums`` does not name are ignored.
    """
    wrong = {name: problem for name, fact in sums.items() if (problem := _file_problem(folder, name, fact))}
    if wrong:
        links = any("link" in problem for problem in wrong.values())
        do = "copy the checkpoint with its links followed: cp -rL." if links else ""
        raise damaged([folder / name for name in wrong], sorted(set(wrong.values())), do)


def _file_problem(folder: pathlib.Path, name: str, fact: Any) -> str | None:
    place = folder
    try:
        for part in name.split("/"):
            place = place / part
            mode = place.lstat().st_mode
            if stat.S_ISLNK(mode):
                return "a link in place of a file"
        if not stat.S_ISREG(mode):
            return "something that is not a file"
        size, crc = (fact["size"], fact["crc32"]) if isinstance(fact, dict) else (None, fact)
        if size is not None and place.stat().st_size != size:
            return "a file of another size"
        return None if _crc_of(place) == crc else "content that does not match its crc32"
    except OSError as failure:
        return f"a missing file ({failure.strerror})"


def _crc_of(file: pathlib.Path) -> int:
    crc = 0
    with open(file, "rb") as data:
        while chunk := data.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def _text(facts: dict) -> bytes:
    rest = {name: value for name, value in facts.items() if name != "crc32"}
    return json.dumps(rest, sort_keys=True, allow_nan=False).encode()


def write_facts(path: pathlib.Path, facts: dict) -> None:
    """Writes ``facts`` and their own crc32 as JSON, flushed to the disk."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(facts | {"crc32": zlib.crc32(_text(facts))}, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())


def write_seal(folder: pathlib.Path, facts: dict) -> None:
    """Writes the sha256 of ``facts`` beside the arrays that they describe."""
    (folder / SEAL).write_text(hashlib.sha256(_text(facts)).hexdigest() + "\n", "ascii")


def check_seal(folder: pathlib.Path, facts: dict) -> None:
    """Raises a `LoraError` if the arrays in ``folder`` were written with other facts."""
    file = folder / SEAL
    if facts["version"] == 1:  # had no seal
        if os.path.lexists(file):
            raise damaged(file, "facts of version 1 beside arrays of a later one")
        return
    found = read_small(file, 200, folder.parent)
    if found.strip() != hashlib.sha256(_text(facts)).hexdigest().encode():
        raise damaged(
            file, "facts (alpha, shapes, methods, ...) that are not those that the arrays were saved with"
        )


def read_small(file: pathlib.Path, limit: int, folder: pathlib.Path) -> bytes:
    """The bytes of a regular file below ``folder``; a link, a pipe or a huge file raises a `LoraError`."""
    place = folder
    try:
        for part in file.relative_to(folder).parts:
            place = place / part
            mode, size = place.lstat().st_mode, place.lstat().st_size
            if stat.S_ISLNK(mode):
                raise damaged(place, "a link", "copy the checkpoint with its links followed: cp -rL.")
        if not stat.S_ISREG(mode) or size > limit:
            raise damaged(file, f"{size} bytes" if stat.S_ISREG(mode) else "something that is not a file")
        with open(file, "rb") as data:
            return data.read(limit)
    except OSError as failure:
        raise damaged(file, f"{type(failure).__name__}: {failure}") from failure


def parse(data: bytes, path: pathlib.Path) -> Any:
    """Parses strict JSON, without NaN, repeated keys or invalid Unicode."""
    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
        json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError, MemoryError) as failure:
        raise damaged(path, f"{type(failure).__name__}: {str(failure)[:300]}") from failure
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is repeated in one object")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def read_facts(path: pathlib.Path, form: str, versions: tuple[int, ...]) -> dict:
    """Reads what `write_facts` wrote; another format or version, or any damage, raises a `LoraError`."""
    facts = parse(read_small(path, FACTS_LIMIT, path.parent), path)
    if not isinstance(facts, dict) or type(facts.get("version")) is not int:
        raise damaged(path, "JSON that does not describe a checkpoint")
    if type(facts.get("crc32")) is not int or facts["crc32"] != zlib.crc32(_text(facts)):
        # This comes before the check of the format, because a flipped byte may be in its name.
        raise damaged(path, "content that does not match its own crc32")
    if facts.get("format") != form or facts["version"] not in versions:
        raise error(
            "unknown checkpoint format.",
            path=path,
            got=f"{str(facts.get('format'))[:80]} version {facts['version']}",
            want=f"{form} version {' or '.join(map(str, versions))}",
            do="update lorax_fn.",
        )
    return facts


def remove(folder: pathlib.Path, facts_name: str, files: Any) -> None:
    """Deletes the files of a checkpoint, facts first, and directories left empty. Other files stay."""
    for name in [facts_name, *files, SEAL, f"arrays/{SEAL}"]:
        file = folder / name
        inside = os.path.realpath(file) == str(file) and file.is_relative_to(folder)
        if inside and file.is_file():
            file.unlink()
    for root, _, _ in os.walk(folder, topdown=False):
        try:
            os.rmdir(root)
        except OSError:
            pass  # It is not empty, as it contains a file that is not ours.


def sweep(path: pathlib.Path) -> None:
    """Removes a directory that was left half-written; if it is a link, only the link."""
    if path.is_symlink():
        path.unlink()
        return
    for _ in range(20):  # After a failed write, Orbax's other threads may still create files in it.
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            return
        time.sleep(0.05)
