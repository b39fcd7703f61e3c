"""Suggestions for patterns that name nothing: the names that other models give to the same weights."""

import difflib
from collections.abc import Sequence

# One line per weight of a transformer, with its names in different libraries.
SAME = (
    ("q", "q_proj", "query", "wq", "query_proj", "q_einsum", "to_q", "q_lin"),
    ("k", "k_proj", "key", "wk", "key_proj", "to_k", "k_lin"),
    ("v", "v_proj", "value", "wv", "value_proj", "to_v", "v_lin"),
    ("kv_einsum", "k_proj", "v_proj", "key", "value"),
    ("o", "o_proj", "out", "wo", "out_proj", "output_proj", "attn_vec_einsum", "to_out", "out_lin", "dense"),
    ("qkv", "c_attn", "query_key_value", "qkv_proj", "Wqkv", "qkv_einsum", "in_proj", "wqkv"),
    ("gate", "gate_proj", "w1", "wi_0", "gating_einsum", "linear_gate"),
    ("up", "up_proj", "w3", "wi_1", "gating_einsum", "fc1", "wi", "c_fc", "linear_up", "intermediate"),
    ("down", "down_proj", "w2", "wo", "linear", "fc2", "c_proj", "linear_down"),
    ("lm_head", "head", "output", "logits", "embed_out", "logits_dense", "proj_out"),
    ("embed", "embedding", "embed_tokens", "wte", "tok_embeddings", "embedder", "token_embedder", "shared"),
)


def meant(parts: Sequence[str], names: Sequence[str]) -> list[str]:
    """Patterns like ``parts`` whose components occur in the tree, the most likely first.

    Args:
      parts: the components of a pattern that names nothing.
      names: all components of all paths of the tree.

    Example:
      >>> from lorax_fn.targets.synonyms import meant
      >>> meant(["attn", "q_proj"], ["attn", "q", "k", "kernel"])
      ['attn/q', 'q']
    """
    known = set(names)
    changed = [_alike(part, names) if part not in known else [part] for part in parts]
    if not all(changed):
        changed = [found for found in changed if found]
    if not changed:
        return []
    last = list(changed[-1])
    whole = ["/".join([*(found[0] for found in changed[:-1]), name]) for name in last]
    return list(dict.fromkeys([*whole, *last]))


def _alike(part: str, names: Sequence[str]) -> list[str]:
    """Names in the tree for the same weight, then names with similar spelling."""
    same = [name for group in SAME if part in group for name in group if name in names]
    folded = [name for name in names if name.lower() == part.lower()]
    stem = part.removesuffix("_proj").removesuffix("_layer")
    stems = [name for name in names if name in (stem, f"{part}_proj", f"{stem}_proj", f"w{stem}")]
    return list(
        dict.fromkeys([*folded, *stems, *same, *difflib.get_close_matches(part, names, n=3, cutoff=0.7)])
    )
