"""Other programs' names as our paths: `preset` for families of models, `infer_mapping` for a proposal.

A mapping is a dict that anybody can write; `lorax_fn.interop.places` explains its notation. An example:

    mapping = {
        "model.embed_tokens": "embed/table",
        "model.layers.{i}.self_attn.q_proj": "layers/attn/q/kernel",  # {i} runs along the stack of a scan
        "model.layers.{i}.self_attn.k_proj": "layers/attn/kv[0]",     # entry 0 of a stack axis
        "model.layers.{i}.self_attn.v_proj": "layers/attn/kv[1]",
        "model.layers.{i}.mlp.gate_up_proj[0/2]": "layers/mlp/gate/kernel",  # the first half of a fused one
        "model.layers.{i}.mlp.gate_up_proj[1/2]": "layers/mlp/up/kernel",
        "model.layers.{i}.mlp.down_proj": "layers/mlp/down/kernel",
        "model.layers.{i}.input_layernorm": "layers/norm/scale",
    }
    lora = lx.peft.load(folder, params, mapping=mapping)
"""

from lorax_fn.interop.infer import infer_mapping as infer_mapping
from lorax_fn.interop.places import Preset as Preset
from lorax_fn.interop.presets import preset as preset
