"""Decides which leaves of a tree are weights, with which layout, and which of them to adapt."""
