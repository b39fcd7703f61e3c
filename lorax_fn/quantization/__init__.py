"""Weights in 4 or 8 bits, and training that accounts for their rounding."""

from lorax_fn.quantization.blocks import Quantized as Quantized
from lorax_fn.quantization.gptq import gptq as gptq
from lorax_fn.quantization.straight_through import merge_aware as merge_aware
from lorax_fn.quantization.trees import dequantize as dequantize
from lorax_fn.quantization.trees import quantize as quantize
