"""Class-incremental learning with the Balanced Softmax. `fastil --help` lists the commands.

>>> import fastil
>>> run = fastil.run("digits", loss="balanced", seed=1)     # what `fastil run` does
>>> run = fastil.Run("runs/digits-s1")       # a run: run.results, run.confusion(), run.network(), run.predict(paths)
>>> images = fastil.Beton("train.beton")     # a data set file by `fastil convert`: labels, class names, images by id
>>> loader = fastil.make_loader(images, "auto", transform, "cuda")     # streams it for your own loop
>>> @fastil.register                         # a method of your own, for `method=NAME`
... class Mine(fastil.Method): ...
"""

from typing import TYPE_CHECKING

from fastil.lazily import names_from

if TYPE_CHECKING:
    from fastil.data.formats.beton import Beton
    from fastil.data.loaders.choose import make_loader
    from fastil.errors import UserError
    from fastil.methods import Method, register
    from fastil.reporting.runs import Run
    from fastil.training.start import run
    from fastil.version import __version__


__getattr__, __dir__ = names_from(__name__, {
    "Beton": "data.formats.beton", "make_loader": "data.loaders.choose", "Method": "methods", "register": "methods",
    "run": "training.start", "Run": "reporting.runs", "UserError": "errors", "__version__": "version",
})  # fmt: skip

__all__ = ["Beton", "Method", "Run", "UserError", "__version__", "make_loader", "register", "run"]
