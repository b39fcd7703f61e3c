"""What mkdocstrings needs to know of this package's docstrings; a griffe extension, named in mkdocs.yml."""

import pathlib
import re
from typing import Any

import griffe

# Every public name has an entry in the reference, under the shortest of its names.
ENTRIES = re.findall(r"^::: (\S+)$", (pathlib.Path(__file__).parent / "api.md").read_text(), re.M)
SHORT = {name.removeprefix("lorax_fn."): name for name in ENTRIES}
LONG = {name: name for name in ENTRIES}
NAME = re.compile(r"(?<!`)`([\w.]+)`(?!`)")


class Docstrings(griffe.Extension):
    """Reads `Example:` as the section of examples that it is, and makes links of names such as `split`."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        del kwargs
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
            obj.docstring.value = NAME.sub(_link, text)


def _link(found: re.Match) -> str:
    entry = {**SHORT, **LONG}.get(found[1])
    return f"[`{found[1]}`][{entry}]" if entry else found[0]
