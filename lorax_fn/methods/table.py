"""The methods by name: one row each."""

from lorax_fn.methods.dora import DoRA
from lorax_fn.methods.loha import LoHa
from lorax_fn.methods.lokr import LoKr
from lorax_fn.methods.lora import LoRA
from lorax_fn.methods.lora_fa import LoRAFA
from lorax_fn.methods.lora_xs import LoRAXS
from lorax_fn.methods.vera import VeRA

METHODS = {
    "lora": LoRA,
    "dora": DoRA,
    "lora_fa": LoRAFA,
    "vera": VeRA,
    "loha": LoHa,
    "lokr": LoKr,
    "lora_xs": LoRAXS,
}
