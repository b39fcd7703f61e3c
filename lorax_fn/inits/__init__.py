"""Inits: the first values of A and B, one file per paper."""

from lorax_fn.inits.base import Init as Init
from lorax_fn.inits.corda import corda as corda
from lorax_fn.inits.eva import eva as eva
from lorax_fn.inits.loftq import loftq as loftq
from lorax_fn.inits.lora_ga import lora_ga as lora_ga
from lorax_fn.inits.olora import olora as olora
from lorax_fn.inits.pissa import pissa as pissa
from lorax_fn.inits.plain import gaussian as gaussian
from lorax_fn.inits.plain import kaiming as kaiming
from lorax_fn.inits.plain import orthogonal as orthogonal
from lorax_fn.inits.plain import zero_a as zero_a
