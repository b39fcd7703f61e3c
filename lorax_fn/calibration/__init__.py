"""Statistics of a function on data, for each weight: sums of x^T x, and mean gradients."""
