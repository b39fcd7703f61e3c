"""One file a method: its paper, its equation, its class; the table of all; dropout."""
