"""LoRA for any JAX function: `split` the parameters, `adapt` the function, `merge` when done."""

import importlib as _importlib
import typing as _typing

from lorax_fn import checkpoint as checkpoint
from lorax_fn import inits as inits
from lorax_fn import quantization as quantization
from lorax_fn import ranks as ranks
from lorax_fn.checkpoint.storage import LoraCheckpointWarning as LoraCheckpointWarning
from lorax_fn.core.adapters import Adapter as Adapter
from lorax_fn.core.errors import LoraError as LoraError
from lorax_fn.core.layouts import Layout as Layout
from lorax_fn.interop.files import LoraFileWarning as LoraFileWarning
from lorax_fn.many.stacking import stack as stack
from lorax_fn.many.stacking import unstack as unstack
from lorax_fn.methods.dora import DoRA as DoRA
from lorax_fn.methods.dropout import dropout as dropout
from lorax_fn.methods.loha import LoHa as LoHa
from lorax_fn.methods.lokr import LoKr as LoKr
from lorax_fn.methods.lora import LoRA as LoRA
from lorax_fn.methods.lora_fa import LoRAFA as LoRAFA
from lorax_fn.methods.lora_xs import LoRAXS as LoRAXS
from lorax_fn.methods.stuck import LoraStuckWarning as LoraStuckWarning
from lorax_fn.methods.vera import VeRA as VeRA
from lorax_fn.methods.whole import Full as Full
from lorax_fn.methods.whole import Rows as Rows
from lorax_fn.quantization.blocks import Quantized as Quantized
from lorax_fn.quantization.trees import dequantize as dequantize
from lorax_fn.quantization.trees import quantize as quantize
from lorax_fn.splitting.merge import delta as delta
from lorax_fn.splitting.merge import merge as merge
from lorax_fn.splitting.rounding import LoraMergeWarning as LoraMergeWarning
from lorax_fn.splitting.rounding import surviving as surviving
from lorax_fn.splitting.split import split as split
from lorax_fn.training import optim as optim
from lorax_fn.training import packing as data  # noqa: F401
from lorax_fn.training.loop import fit as fit
from lorax_fn.training.masks import mask as mask
from lorax_fn.training.masks import train_only as train_only
from lorax_fn.training.masks import trainable as trainable
from lorax_fn.training.masks import with_trainable as with_trainable
from lorax_fn.training.mesh import mesh_train_step as mesh_train_step
from lorax_fn.training.pmap import pmap_train_step as pmap_train_step
from lorax_fn.training.pmap import replicate as replicate
from lorax_fn.training.pmap import shard as shard
from lorax_fn.training.pmap import unreplicate as unreplicate
from lorax_fn.training.sharding import shardings as shardings
from lorax_fn.training.state import TrainState as TrainState
from lorax_fn.training.step import apply_gradients as apply_gradients
from lorax_fn.training.step import make_train_step as make_train_step
from lorax_fn.training.step import value_and_grad as value_and_grad
from lorax_fn.training.stopping import FitError as FitError
from lorax_fn.transform.adapt import adapt as adapt
from lorax_fn.transform.usage import Usage as Usage
from lorax_fn.transform.usage import usage as usage
from lorax_fn.transform.walk import LoraFallbackWarning as LoraFallbackWarning

if _typing.TYPE_CHECKING:
    from lorax_fn import report as report
    from lorax_fn import sweeps as sweeps
    from lorax_fn.interop import huggingface as huggingface
    from lorax_fn.interop import kohya as kohya
    from lorax_fn.interop import mappings as mappings
    from lorax_fn.interop import peft as peft
    from lorax_fn.many.banks import Bank as Bank
    from lorax_fn.many.banks import bank as bank
    from lorax_fn.many.combining import combine as combine
    from lorax_fn.many.combining import interpolate as interpolate
    from lorax_fn.many.combining import scale as scale
    from lorax_fn.many.combining import subtract as subtract
    from lorax_fn.report.tables import summary as summary
    from lorax_fn.sweeps.grid import grid as grid
    from lorax_fn.sweeps.sweep import sweep as sweep

__version__ = "0.1.0"

# What few programs need loads when it is first used, so that importing the rest stays quick.
_LATER = {
    **{name: f"interop.{name}" for name in ("huggingface", "kohya", "mappings", "peft")},
    **{name: name for name in ("report", "sweeps")},
    **{name: f"many.banks:{name}" for name in ("Bank", "bank")},
    **{name: f"many.combining:{name}" for name in ("combine", "interpolate", "scale", "subtract")},
    "grid": "sweeps.grid:grid",
    "summary": "report.tables:summary",
    "sweep": "sweeps.sweep:sweep",
}


def __getattr__(name: str) -> _typing.Any:
    if name in _LATER:
        place, _, attribute = _LATER[name].partition(":")
        module = _importlib.import_module(f"lorax_fn.{place}")
        return getattr(module, attribute) if attribute else module
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
