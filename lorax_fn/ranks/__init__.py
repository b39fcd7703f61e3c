"""What adapters look like by their singular values, and other ranks for them."""
