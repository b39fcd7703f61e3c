"""Several adapters of one base: side by side, in a bank, combined."""
