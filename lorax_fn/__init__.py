"""LoRA for any JAX function: `split` the parameters, `adapt` the function, `merge` when done."""

from lorax_fn import checkpoint as checkpoint
from lorax_fn.blocks import Quantized as Quantized
from lorax_fn.dropping import dropout as dropout
from lorax_fn.methods.dora import DoRA as DoRA
from lorax_fn.methods.loha import LoHa as LoHa
from lorax_fn.methods.lokr import LoKr as LoKr
from lorax_fn.methods.lora import LoRA as LoRA
from lorax_fn.methods.lora import LoRAFA as LoRAFA
from lorax_fn.methods.vera import VeRA as VeRA
from lorax_fn.methods.whole import Full as Full
from lorax_fn.methods.whole import Rows as Rows
from lorax_fn.quantization import dequantize as dequantize
from lorax_fn.quantization import quantize as quantize
from lorax_fn.ranks import Spectrum as Spectrum
from lorax_fn.ranks import effective_rank as effective_rank
from lorax_fn.ranks import resize as resize
from lorax_fn.ranks import to_plain as to_plain
from lorax_fn.ranks import truncate as truncate
from lorax_fn.reallocation import reallocate as reallocate
from lorax_fn.reallocation import sensitivity as sensitivity
from lorax_fn.report import Summary as Summary
from lorax_fn.report import summary as summary
from lorax_fn.residual_inits import loftq as loftq
from lorax_fn.splitting import delta as delta
from lorax_fn.splitting import merge as merge
from lorax_fn.splitting import split as split
from lorax_fn.training.optim import lora_fa_gradient as lora_fa_gradient
from lorax_fn.training.optim import loraplus as loraplus
from lorax_fn.training.optim import mask as mask
from lorax_fn.training.optim import riemannian as riemannian
from lorax_fn.training.optim import train_only as train_only
from lorax_fn.training.step import TrainState as TrainState
from lorax_fn.training.step import make_train_step as make_train_step
from lorax_fn.transform.tracing import Usage as Usage
from lorax_fn.transform.tracing import usage as usage
from lorax_fn.transform.walk import LoraFallbackWarning as LoraFallbackWarning
from lorax_fn.transform.walk import adapt as adapt
from lorax_fn.types import Adapter as Adapter
from lorax_fn.types import Layout as Layout
from lorax_fn.types import LoraError as LoraError
from lorax_fn.types import WeightUse as WeightUse

__version__ = "0.1.0"
