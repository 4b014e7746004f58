"""The installed version."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fastil")
except PackageNotFoundError:  # a checkout that is only on the path, as on a machine where nothing may be installed
    __version__ = "0+checkout"
