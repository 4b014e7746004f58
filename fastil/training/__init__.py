"""A run: what is trained on in each step, the loop, the run directory."""
