"""The documentation: its reference holds every public name, and its navigation every page."""

import pathlib
import re

import api_page
from test_house import all_public

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_the_reference_is_that_of_the_code():
    assert api_page.PAGE.read_text() == api_page.page(), "python tests/api_page.py"


def test_every_public_name_is_in_the_reference():
    text = api_page.PAGE.read_text()
    named = set(re.findall(r"^::: (\S+)$|`(lorax_fn\.[\w.]+)`", text, re.M))
    assert set(all_public()) <= {name for pair in named for name in pair}


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    listed = re.findall(r": (\S+\.md)$", nav, re.M)
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_the_glossary_has_the_words_of_the_field():
    text = (DOCS / "glossary.md").read_text()
    words = "all-linear, hot-swap, unmerge, rank pattern, network_alpha, lora_down, disable_adapter, "
    words += "modules_to_save, multi-LoRA"
    assert not [word for word in words.split(", ") if word not in text]
