"""Several adapters of one base: stacked for `jax.vmap`, in a bank, or combined."""
