"""What data does to each weight of a function: sums of x^T x, and mean gradients."""
