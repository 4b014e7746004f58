"""Class-incremental learning with the Balanced Softmax. `fastil --help` lists the commands.

>>> import fastil
>>> run = fastil.run("digits", loss="balanced", seed=1)     # what `fastil run` does
>>> run = fastil.Run("runs/digits-s1")       # a run: run.results, run.confusion(), run.network(), run.predict(paths)
>>> images = fastil.Beton("train.beton")     # a data set file by `fastil convert`: labels, class names, images by id
>>> loader = fastil.make_loader(images, "auto", transform, "cuda")     # streams it for your own loop
>>> @fastil.register                         # a method of your own, for `method=NAME`
... class Mine(fastil.Method): ...
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastil.data.formats.beton import Beton
    from fastil.data.loaders.choose import make_loader
    from fastil.methods import Method, register
    from fastil.reporting.runs import Run
    from fastil.training.start import run

# Imported when asked for: torch takes seconds, which `fastil --help` should not.
_HOMES = {
    "Beton": "data.formats.beton", "make_loader": "data.loaders.choose", "Method": "methods", "register": "methods",
    "run": "training.start", "Run": "reporting.runs",
}  # fmt: skip

__all__ = ["Beton", "Method", "Run", "__version__", "make_loader", "register", "run"]
__version__: str


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("fastil")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
