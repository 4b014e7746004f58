"""Data sets, their file formats, and the loaders that stream them."""

from typing import TYPE_CHECKING

from fastil.lazily import names_from

if TYPE_CHECKING:
    from fastil.data.formats.beton import Beton
    from fastil.data.loaders.batch import Batch, Inputs
    from fastil.data.loaders.choose import Loader, make_loader
    from fastil.data.sources import DataConfig, Dataset, Split, load_dataset

# Imported on first use: the loaders need torch, and the command line tools of this package do not.
__getattr__, __dir__ = names_from(__name__, {
    "Beton": "formats.beton", "Batch": "loaders.batch", "Inputs": "loaders.batch", "Loader": "loaders.choose",
    "make_loader": "loaders.choose", "DataConfig": "sources", "Dataset": "sources", "Split": "sources",
    "load_dataset": "sources",
})  # fmt: skip

__all__ = ["Batch", "Beton", "DataConfig", "Dataset", "Inputs", "Loader", "Split", "load_dataset", "make_loader"]
