"""The two ends of a run: `split` makes adapters, and `merge` folds them into the weights."""
