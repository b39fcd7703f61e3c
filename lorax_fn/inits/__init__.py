"""Where training starts: the first values of A and B, each from its paper."""
