"""python -m fastil: the command, for launchers such as torchrun that start modules."""

from fastil.cli import main

main()
