"""Finished runs side by side: tables, figures, pages."""
