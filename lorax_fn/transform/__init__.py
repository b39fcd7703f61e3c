"""The program transform: the traced model is walked on weights that are kept as base and factors."""
