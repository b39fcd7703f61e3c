"""Training steps, optimizers, devices, and the loop around them."""
