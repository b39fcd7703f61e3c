"""The model card that goes with an adapter."""

from collections.abc import Mapping
from typing import Any


def model_card(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> str:
    """A ``README.md`` with the front matter that the Hub reads."""
    base = config.get("base_model_name_or_path")
    head = ["---", *([f"base_model: {base}"] if base else []), "library_name: peft", "tags:", "- lora", "---"]
    count = sum(x.size for x in tensors.values())
    alpha = config.get("lora_alpha", config.get("alpha"))
    facts = [f"- kind: {config['peft_type']}", f"- rank: {config.get('r')}"]
    facts += [f"- alpha: {alpha}"] if alpha is not None else []
    facts += [
        f"- numbers: {count:,}",
        f"- modules: {', '.join(config.get('target_modules') or []) or 'none'}",
    ]
    about = f"An adapter of {base}." if base else "An adapter."
    use = [
        "```python",
        "from peft import PeftModel",
        "",
        'model = PeftModel.from_pretrained(base_model, "path/to/this/folder")',
        "```",
    ]
    return "\n".join([*head, "", about, "", *facts, "", *use, ""])
