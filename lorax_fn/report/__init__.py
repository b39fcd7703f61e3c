"""Tables of a model and its adapters, for people."""
