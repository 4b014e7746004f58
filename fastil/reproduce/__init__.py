"""The tables of the paper: the runs they need, and what is written of them."""
