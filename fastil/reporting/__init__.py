"""Finished runs: read, put side by side in tables, figures and pages, and used to classify images."""
