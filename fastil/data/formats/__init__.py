"""The formats that data sets have on disk, one file each."""
