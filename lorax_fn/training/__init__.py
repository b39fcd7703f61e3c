"""Steps, optimizers, devices, and the loop around them."""
