"""Data set conversion and verification."""
