"""Which leaves of a tree are weights, with which layout, and which of them were asked for."""
