"""LoRA-FA: Zhang et al., "LoRA-FA: Memory-efficient Low-rank Adaptation" (https://arxiv.org/abs/2308.03303)."""

import dataclasses
from typing import Any, ClassVar

from lorax_fn.core.adapters import Factors, register
from lorax_fn.core.frozen import frozen
from lorax_fn.methods.lora import LoRA


@register
class LoRAFA(LoRA):
    """LoRA with a frozen random A: only B trains, so the backward pass keeps ``x @ A`` instead of ``x``.

    Zhang et al., "LoRA-FA" (https://arxiv.org/abs/2308.03303), equation (2).

    Args:
      a: ``[*s, *n, r]``, frozen.
      b: ``[*s, r, *m]``.
      alpha: as in `LoRA`.
      rank: as in `LoRA`.
      scaling: as in `LoRA`.
      layout: as in `LoRA`.
      key: as in `LoRA`.
      rate: as in `LoRA`.
      residual: as in `LoRA`.

    Example:
      >>> import jax, jax.numpy as jnp, lorax_fn as lx
      >>> _, lora = lx.split({"kernel": jnp.ones((3, 2))}, rank=1, method="lora_fa")
      >>> lx.mask(lora)["kernel"].a, lx.mask(lora)["kernel"].b
      (False, True)
    """

    frozen: ClassVar[tuple[str, ...]] = ("a",)

    @classmethod
    def refuses(cls, shape: tuple[int, ...], start: Any) -> str | None:
        if start.init.zero_a:
            return "an init whose A is not zero: A is frozen, and B gets no gradient through a zero A"
        return None

    def pair(self) -> Factors:
        return dataclasses.replace(super().pair(), a=frozen(self.a, "LoRAFA"))
