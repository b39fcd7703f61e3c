"""Recognizes output heads, embedding tables and norms by the names that real models give them."""

import functools
import re

from lorax_fn.targets.patterns import components

WEIGHT_NAMES = ("kernel", "w", "weight", "weight_ih", "weight_hh")


OUT_IN_NAMES = ("weight", "weight_ih", "weight_hh")  # torch and Equinox; `kernel` and `w` are (in, out)


EMBEDDING_NAMES = ("embedding", "embeddings")


# Components that mark everything below them in a path as a head.
HEAD_NAMES = ("lm_head", "head", "logits", "unembed", "unembedding", "classifier", "output_projection")


_HEAD = re.compile(
    r"(.*_)?(lm|mlm|nsp|cls|classification|prediction|contact|value|reward|v|score|regression|ctc|vocab|logits?)"
    r"_head",
    re.IGNORECASE,
)


# Names of modules whose own weight is a head.
_HEAD_MODULES = (
    "score", "readout", "embed_out", "logits_dense", "to_logits", "token_logits", "vocab_logits",
    "qa_outputs", "seq_relationship", "vocab_projector", "vocab_proj", "lm_loss", "class_embed", "bbox_embed",
)  # fmt: skip


# Names of heads outside of layers; inside layers, these are projections of attention and MLP.
_OUTER_HEADS = ("output", "proj_out", "output_layer", "ff_out", "w_out")


_BLOCK = re.compile(r"\d+|h(_?\d+)?|.*(layers?|blocks?|attn|attention|mlp|ffn)(_?\d+)?", re.IGNORECASE)


_NORMS = re.compile(r"(layer|rms|group|batch|instance)?norm|ln|bn")


_TABLES = ("emb", "embs", "embed", "embeds", "embedding", "embeddings", "wte", "wpe", "codebook")


_RELATIVE = re.compile(r"rel(ative)?_(attention|attn|position|pos)?_?bias")


_PROJECTIONS = ("proj", "projection", "project", "linear", "dense", "fc", "mlp", "mapping", "embedder")


@functools.lru_cache(1 << 16)
def module_of(path: str) -> str:
    """The name of the module that owns a leaf: the last component before it that is not an index."""
    return next((part for part in reversed(components(path)[:-1]) if not part.isdigit()), "")


def is_head(path: str) -> bool:
    """Whether the names in a path say that it is an output head. Its position in the tree does not count."""
    parts, module = components(path), module_of(path)
    if any(map(_names_head, parts)) or module in _HEAD_MODULES:
        return True
    owners = parts[: parts.index(module)] if module else ()
    if module == "decoder":  # the output table of BERT-like models
        return any(part in ("predictions", "cls") for part in owners)
    if module == "linear" and owners:  # the output of a diffusion transformer
        return owners[-1] == "final_layer"
    inner = any(_BLOCK.fullmatch(part) for part in owners)
    return (module in _OUTER_HEADS and not inner) or parts == ("fc", "weight")  # torchvision's classifiers


@functools.lru_cache(1 << 12)
def _names_head(part: str) -> bool:
    return part in HEAD_NAMES or _HEAD.fullmatch(part) is not None


def is_norm(module: str) -> bool:
    """Whether a module's name says that it is a norm, such as ``norm_q``, ``attn_norm_pre`` or ``ln_1``."""
    words = _words(module)
    return any(map(_NORMS.fullmatch, words)) and not any(word in _PROJECTIONS for word in words)


def is_table(path: str) -> bool:
    """Whether a path says that it is an embedding table: ``embed_tokens``, ``wte`` or T5's ``shared``."""
    module = module_of(path)
    if _RELATIVE.fullmatch(module):
        return True
    if module == "shared":
        return not any(_BLOCK.fullmatch(part) for part in components(path)[:-2])
    words = _words(module)
    return any(word in _TABLES for word in words) and not any(word in _PROJECTIONS for word in words)


def may_be_table(module: str) -> bool:
    """Whether a module may be a table or a projection by its name, such as ``embed_proj``."""
    return "emb" in module.lower()


def _words(module: str) -> list[str]:
    """The words of a module's name in lower case, without digits, so that ``norm1`` is a norm."""
    return [word.rstrip("0123456789") for word in re.split(r"[_-]", module.lower())]
