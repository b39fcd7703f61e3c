"""The ways to train that `peers.py` compares, one file per library; `problem.py` is what all are given."""
