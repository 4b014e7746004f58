"""Data sets, how they lie in files, and the loaders that stream them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastil.data.loaders.batch import Batch
    from fastil.data.loaders.choose import Loader, make_loader
    from fastil.data.sources import DataConfig, Dataset, Split, load_dataset

# Imported when asked for: the loaders bring torch, which the command line tools of this package do without.
_HOMES = {
    "Batch": "loaders.batch", "Loader": "loaders.choose", "make_loader": "loaders.choose", "DataConfig": "sources",
    "Dataset": "sources", "Split": "sources", "load_dataset": "sources",
}  # fmt: skip

__all__ = ["Batch", "DataConfig", "Dataset", "Loader", "Split", "load_dataset", "make_loader"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
