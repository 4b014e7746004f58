"""Data sets held in memory and the loaders that stream them."""

from fastil.data.resident import Batch, Loader, make_loader
from fastil.data.sources import DataConfig, Dataset, Split, load_dataset

__all__ = ["Batch", "DataConfig", "Dataset", "Loader", "Split", "load_dataset", "make_loader"]
