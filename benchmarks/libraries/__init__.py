"""The ways to train that `peers.py` compares, one file per library; each reads its problem from `problem.py`."""
