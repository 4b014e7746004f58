"""How data sets lie on disk, a file for each format."""
