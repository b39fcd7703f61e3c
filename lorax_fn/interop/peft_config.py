"""`adapter_config.json`: what its fields mean for the numbers, and which of them are not supported here."""

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from lorax_fn.core.errors import error
from lorax_fn.interop.files import LoraFileWarning

PREFIX = "base_model.model."
TYPES = ("LORA", "ADALORA", "LOHA", "LOKR", "VERA")

# Fields that say how an adapter was trained or made, or where: another value changes no number of it.
HARMLESS = {
    *(
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "deltaT",
        "ensure_weight_tying",
        "eva_config",
    ),
    *(
        "beta1",
        "beta2",
        "d_initial",
        "inference_mode",
        "init_r",
        "init_weights",
        "loftq_config",
        "lora_dropout",
    ),
    *(
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "module_dropout",
        "monteclora_config",
        "task_type",
    ),
    *(
        "orth_reg_weight",
        "peft_version",
        "projection_prng_key",
        "qalora_group_size",
        "rank_dropout",
        "revision",
    ),
    *("rank_dropout_scale", "runtime_config", "target_r", "tfinal", "tinit", "total_step", "vera_dropout"),
    *("unsloth_fixed", "unsloth_version", "velora_config", "loraplus_lr_ratio", "decompose_factor"),
    *("decompose_both", "use_effective_conv2d"),  # what the tensors tell by themselves
}
# Fields that have their effect here.
KNOWN = {
    *("peft_type", "r", "lora_alpha", "alpha", "use_rslora", "use_dora", "bias", "lora_bias", "rank_pattern"),
    *("alpha_pattern", "target_modules", "exclude_modules", "modules_to_save", "target_parameters"),
    *(
        "layers_to_transform",
        "layers_pattern",
        "trainable_token_indices",
        "fan_in_fan_out",
        "init_lora_weights",
    ),
    *("save_projection",),
}
# Fields that change what an adapter computes, in ways that no adapter here has.
FOREIGN = {
    "alora_invocation_tokens": "an adapter that acts from certain tokens on",
    "arrow_config": "a router over several adapters",
    "kasa_config": "a base without its smallest singular values",
    "layer_replication": "layers used several times with adapters of their own",
    "use_bdlora": "block-diagonal factors",
    "use_qalora": "inputs pooled by groups",
}
# The adapter's file does not contain what an init of these names took out of W.
RESIDUAL = ("pissa", "olora", "corda", "lora_ga", "loftq")
_SAYS_SOMETHING = re.compile(
    r"^use_|_config$|scal|alpha|rank|layer|weight|variant|magnitude|norm|pattern|init"
)


def check_config(config: Mapping[str, Any], path: Any, strict: bool) -> None:
    """Refuses a config whose adapter would be computed differently here; warns of fields that are ignored.

    Raises:
      LoraError: the kind is unknown, alpha or another number is missing or not a number, or a field changes
        the mathematics in a way that is not known here.
    """
    kind = config.get("peft_type")
    if kind not in TYPES:
        raise error(
            "this kind of PEFT adapter has no counterpart here.",
            path=path,
            got=f"peft_type={kind!r}",
            want=f"one of {', '.join(TYPES)}",
            do="merge it in PEFT (merge_and_unload) and read the weights with lx.huggingface.load.",
        )
    _check_numbers(config, path)
    foreign = {name: words for name, words in FOREIGN.items() if config.get(name)}
    if foreign:
        raise error(
            "fields of this config change what the adapter computes, in ways that are not implemented here.",
            path=path,
            got=[f"{name}={config[name]!r}: {words}" for name, words in foreign.items()],
            do="merge it in PEFT (merge_and_unload) and read the weights with lx.huggingface.load.",
        )
    init = str(config.get("init_lora_weights", "")).lower()
    if strict and init.startswith(RESIDUAL) and kind == "LORA":
        raise error(
            f"this adapter belongs to what the init {init!r} left of W, not to W itself.",
            path=path,
            got=f"init_lora_weights={config['init_lora_weights']!r}",
            want="an adapter of the original weights",
            do="save it again in PEFT with path_initial_model_for_weight_conversion=; or, where params are "
            "that residual, load with strict=False.",
        )
    unknown = [name for name in config if name not in HARMLESS | KNOWN | set(FOREIGN)]
    grave = [name for name in unknown if _may_change_numbers(name, config[name])]
    if grave and strict:
        raise error(
            "fields of this config are unknown here and may change what the adapter computes.",
            path=path,
            got=[f"{name}={config[name]!r}" for name in grave],
            do="update lorax_fn; or load with strict=False, which ignores them with a warning.",
        )
    if unknown:
        text = f"{path}: these fields have no meaning here and were ignored: {', '.join(sorted(unknown))}"
        warnings.warn(text, LoraFileWarning, stacklevel=4)


def _may_change_numbers(name: str, value: Any) -> bool:
    """An unset field changes nothing, and neither does free text under a name unrelated to computation."""
    if value is None or value is False or value in ("", [], {}):
        return False
    return not isinstance(value, str) or _SAYS_SOMETHING.search(name) is not None


def _check_numbers(config: Mapping[str, Any], path: Any) -> None:
    alpha = alpha_name(config)
    wrong = []
    if alpha is not None and alpha not in config:
        raise error(
            f"the config has no {alpha}, and so the adapter has no scale.",
            path=path,
            got=f"fields {', '.join(sorted(config)[:12])}",
            want=f'"{alpha}": the number that the adapter was trained with',
            do="add it to adapter_config.json; a guess may be wrong many times over.",
        )
    if alpha is not None and not _is_number(config[alpha]):
        wrong.append(f"{alpha}={config[alpha]!r}")
    if "r" in config and not _is_rank(config["r"]):
        wrong.append(f"r={config['r']!r}")
    for name, good in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        pattern = config.get(name) or {}
        if config["peft_type"] == "ADALORA" and name == "rank_pattern":
            continue
        if not isinstance(pattern, dict):
            wrong.append(f"{name}={pattern!r}")
        else:
            wrong += [f"{name}[{key!r}]={x!r}" for key, x in pattern.items() if not good(x)]
    for name in ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias"):
        if not isinstance(config.get(name) or False, bool):
            wrong.append(f"{name}={config[name]!r}")
    if config.get("bias") not in (None, "none", "all", "lora_only"):
        wrong.append(f"bias={config['bias']!r}")
    if wrong:
        raise error(
            "fields of this config have values that they cannot have.",
            path=path,
            got=wrong,
            want="ranks of 1 or more, finite alphas, true or false",
            do="correct adapter_config.json.",
        )


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e30 and math.isfinite(x)


def _is_rank(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and 0 < x < 2**31


def alpha_name(config: Mapping[str, Any]) -> str | None:
    """The field that holds alpha; VeRA has none."""
    kind = config.get("peft_type")
    return {"LORA": "lora_alpha", "ADALORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}.get(str(kind))


def value_of(module: str, patterns: Mapping[str, Any] | None, default: Any) -> Any:
    """PEFT's rule: the first key, in the order of the file, that is the end of the name or all of it."""
    for key, value in (patterns or {}).items():
        if ends_with(key, module):
            return value
    return default


def unused_keys(patterns: Mapping[str, Any] | None, modules: Iterable[str]) -> list[str]:
    """The keys that are not the first match of any module, but for the one that PEFT itself adds."""
    used = {next((k for k in patterns or {} if ends_with(k, module)), None) for module in modules}
    return [key for key in patterns or {} if key not in used and key != _FUSED_EXPERTS]


# Written by PEFT for models with experts wherever gate_proj and up_proj are targets, be they experts or not.
_FUSED_EXPERTS = r".*\.gate_up_proj"


def ends_with(key: str, module: str) -> bool:
    r"""``re.match(rf"(.*\.)?({key})$", module)``, without a regex where the key is a name."""
    if re.fullmatch(r"[\w.-]*", key):  # a name: a dot in it is a regex's dot, and stands for any one letter
        tail, before = module[len(module) - len(key) :], module[: len(module) - len(key)]
        alike = len(tail) == len(key) and all(k in (t, ".") for k, t in zip(key, tail, strict=True))
        return alike and (not before or before.endswith("."))
    return _regex(rf"(.*\.)?({key})").fullmatch(module) is not None


def _regex(pattern: str) -> re.Pattern:
    """A regex from a file; one that is invalid or could run forever is an error."""
    own = pattern.removeprefix(r"(.*\.)?")
    nested = re.search(r"[+*}]\)*[+*{]|\([^()]*[+*{|][^()]*\)[+*{]", own)
    # names come from our own tree and have some sixty letters: six open repetitions end within a second
    if len(pattern) > 4000 or nested or len(re.findall(r"[*+]|\{\d*,\}", own)) > 6:
        raise error(
            "a pattern of this config may take forever to match.",
            got=pattern[:200],
            want="no repetition inside a repetition, and six of them at most",
            do="write it as names of modules.",
        )
    try:
        return re.compile(pattern)
    except re.error as failure:
        raise error(
            "a pattern of this config is not a regular expression.",
            got=f"{pattern[:200]!r}: {failure}",
            do="correct adapter_config.json.",
        ) from failure


def is_targeted(module: str, config: Mapping[str, Any]) -> bool:
    """Whether PEFT adapts a module of this name; ``"all-linear"`` is not decided here."""
    if _matches(config.get("exclude_modules"), module) or _is_saved(module, config):
        return False
    targets = config.get("target_modules")
    if not _matches(targets, module):
        return False
    layers = config.get("layers_to_transform")
    if layers in (None, []) or isinstance(targets, str):
        return True
    index = _layer_index(module, config.get("layers_pattern"))
    return index is not None and index in ([layers] if isinstance(layers, int) else layers)


def _matches(targets: Any, module: str) -> bool:
    if not targets or targets == "all-linear":
        return False
    if isinstance(targets, str):
        return _regex(targets).fullmatch(module) is not None
    return isinstance(targets, list) and any(
        isinstance(t, str) and (module == t or module.endswith(f".{t}")) for t in targets
    )


def _is_saved(module: str, config: Mapping[str, Any]) -> bool:
    names = config.get("modules_to_save") or []
    return any(isinstance(name, str) and f".{name}." in f".{module}." for name in names)


def _layer_index(module: str, patterns: Any) -> int | None:
    """The first number after a name, or after one of ``layers_pattern``, as PEFT finds it."""
    listed = [patterns] if isinstance(patterns, str) else patterns or [r"[^.]*"]
    for pattern in listed:
        match = _regex(rf".*?\.{pattern}\.(\d+)\..*").fullmatch(module)
        if match is not None:
            return int(match.group(match.lastindex or 1))
    return None


def with_others(
    facts: dict[str, Any],
    others: Mapping[str, Any],
    modules: Mapping[str, tuple[int, float]],
    places: Iterable[Any],
    whole_tree: bool,
) -> dict[str, Any]:
    """The config with those fields of an older one that adapters do not decide, or that say the same."""
    decided = {
        *("peft_type", "r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_dora", "use_rslora"),
        *("bias", "lora_bias", "fan_in_fan_out", "modules_to_save", "target_parameters", "target_modules"),
        *("trainable_token_indices", "init_lora_weights", "layers_to_transform", "layers_pattern"),
        *("exclude_modules", "decompose_factor", "decompose_both", "use_effective_conv2d", "save_projection"),
    }
    kept = facts | {name: value for name, value in others.items() if name not in decided}
    if others.get("peft_type") != facts["peft_type"] or facts["peft_type"] == "VERA":
        return kept
    if "r" in others and modules and _same_numbers(others, modules):
        names = ("r", str(alpha_name(facts)), "rank_pattern", "alpha_pattern")
        kept |= {name: others[name] for name in names if name in others}
    targeting = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    tensors = {place.tensor: place.module for place in places if place.tensor.endswith(".weight")}
    chosen = {module for module in tensors.values() if is_targeted(module, others)}
    if whole_tree and chosen == set(modules) & set(tensors.values()) and others.get("target_modules"):
        kept |= {name: others[name] for name in targeting if name in others}
    ours, theirs = facts.get("modules_to_save"), others.get("modules_to_save")
    if isinstance(ours, list) and isinstance(theirs, list):
        if all(any(f".{module}".endswith(f".{name}") for name in theirs) for module in ours):
            kept["modules_to_save"] = theirs
    return kept


def _same_numbers(others: Mapping[str, Any], modules: Mapping[str, tuple[int, float]]) -> bool:
    alpha = others.get(alpha_name(others) or "")
    return all(
        value_of(module, others.get("rank_pattern"), others["r"]) == rank
        and value_of(module, others.get("alpha_pattern"), alpha) == number
        for module, (rank, number) in modules.items()
    )
