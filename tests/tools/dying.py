"""Work for a pool of workers, which import it from here: the other files of the tests bring torch."""

import os
import signal

from fastil.errors import UserError


def die_at(item):
    if item == 11:
        os.kill(os.getpid(), signal.SIGKILL)
    if item == 12:
        raise KeyError("twelve")
    if item == 13:
        raise UserError("thirteen is wrong")
    return item
