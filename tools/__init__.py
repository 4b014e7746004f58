"""Data set conversion, verification and checks that run ahead of time."""
