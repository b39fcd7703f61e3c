"""docs/api.md, made from the package: ``python tests/api_page.py`` writes it, tests/test_docs.py compares."""

import pathlib

import house_map
from test_house import all_public

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "api.md"
HEAD = """# API reference

<!-- Made by python tests/api_page.py; do not edit. -->

All public names, from their docstrings, by the folder of the package that holds them. After
`import lorax_fn as lx`, `lorax_fn.split` is `lx.split`.
"""
# The folders in the order in which a reader meets them; one that is not named here comes after these.
ORDER = (
    "splitting",
    "transform",
    "report",
    "training",
    "checkpoint",
    "many",
    "methods",
    "inits",
    "ranks",
    "quantization",
    "core",
)
# What comes first among its like; the others follow in alphabetical order, warnings and errors last.
FIRST = (
    "split",
    "merge",
    "adapt",
    "usage",
    "TrainState",
    "make_train_step",
    "fit",
    "checkpoint.save",
    "LoRA",
)


def folder_of(value):
    return value.__module__.split(".")[1]


def sections():
    """``{folder: {name: other names of the same thing}}``; the shortest name of a thing is its name."""
    by_thing = {}
    for name, value in all_public().items():
        by_thing.setdefault(id(value), (value, []))[1].append(name)
    found = {}
    for value, names in by_thing.values():
        first, *others = sorted(names, key=lambda name: (name.count("."), name))
        found.setdefault(folder_of(value), {})[first] = others
    return dict(sorted(found.items(), key=lambda item: (*_place(item[0]), item[0])))


def _place(folder):
    return (ORDER.index(folder),) if folder in ORDER else (len(ORDER),)


def _rank(name):
    short = name.removeprefix("lorax_fn.")
    first = FIRST.index(short) if short in FIRST else len(FIRST)
    return first, short.endswith(("Warning", "Error")), short.count("."), short.lower(), short


def page():
    parts = [HEAD]
    for folder, names in sections().items():
        intro = house_map.first_line(house_map.PACKAGE / folder / "__init__.py")
        parts.append(f"## {folder.capitalize()}\n\n{intro}\n")
        for name, others in sorted(names.items(), key=lambda item: _rank(item[0])):
            parts.append(f"::: {name}\n")
            if others:
                parts.append(f"Also {', '.join(f'`{other}`' for other in others)}.\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
