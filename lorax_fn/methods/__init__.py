"""One file per method, with its paper, equation and class; the table of methods; dropout."""
