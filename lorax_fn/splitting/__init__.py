"""The two ends of a run: `split` makes the trainable factors, `merge` folds them back."""
