"""Python processes that begin at once: each is a fork of one that has imported torch and other packages already.

Importing them takes seconds, which is more than most commands take. What a process does after that is its own: it
imports every module of fastil itself and has the environment and the folder it is given.
"""

import atexit
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from pathlib import Path

# What fastil's modules import in the end. torch._dynamo brings Triton, so TRITON_INTERPRET is what it is here.
PACKAGES = (
    "numpy", "PIL.Image", "pydantic", "simplejpeg", "sklearn.datasets", "torch._dynamo", "tqdm", "typer", "yaml",
    "matplotlib.backends.backend_agg",
)  # fmt: skip

NO_FIGURES = "FORKS_DRAW_NO_FIGURES"  # in the environment of a process: its runs draw none, which takes them a second


class Forks:
    """Starts processes as subprocess.Popen([sys.executable, *arguments]) does; close() ends what it forks from."""

    def __init__(self, environment):
        command = [sys.executable, __file__]
        self.server = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def ask(self, *request):
        self.server.stdin.write(json.dumps(request) + "\n")
        return json.loads(self.server.stdout.readline())

    def start(self, arguments, folder, environment, *outputs):
        """arguments: as of Python's command line, from -m or -c on. outputs: files to append to, for stdout and stderr;
        one for both."""
        pid = self.ask("start", [*map(str, arguments)], str(folder), environment, str(outputs[0]), str(outputs[-1]))
        return Process(self, pid, outputs)

    def run(self, arguments, folder, environment):
        """The finished process, as subprocess.run(..., capture_output=True, text=True) returns it."""
        with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
            process = self.start(arguments, folder, environment, out.name, err.name)
            stdout, stderr = process.communicate()
        return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)

    def close(self):
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()


class Process:
    """What the tests need of subprocess.Popen."""

    def __init__(self, forks, pid, outputs):
        self.forks, self.pid, self.outputs, self.returncode = forks, pid, outputs, None

    def poll(self, block=False):
        if self.returncode is None:
            self.returncode = self.forks.ask("wait", self.pid, block)
        return self.returncode

    def wait(self):
        return self.poll(block=True)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self):
        """What it wrote to stdout and stderr (None where they are one), once it has ended."""
        self.wait()
        texts = [Path(path).read_text() for path in self.outputs]
        return texts[0], texts[1] if len(texts) > 1 else None


def serve():
    """Answer each line of stdin. In a forked process this returns the work it is to do."""
    answers = os.fdopen(os.dup(1), "w")
    for name in PACKAGES:
        importlib.import_module(name)
    for line in sys.stdin:
        action, *given = json.loads(line)
        if action == "start":
            answer = os.fork()
            if answer == 0:
                answers.close()
                return given
        else:
            pid, block = given
            ended, status = os.waitpid(pid, 0 if block else os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        print(json.dumps(answer), file=answers, flush=True)
    return None


def work(arguments, folder, environment, *outputs):
    """Become the process that was asked for, until it ends."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for descriptor, path in enumerate((os.devnull, *outputs)):
        file = os.open(path, os.O_RDWR | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a suite under nohup would hand down its own
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    option, code, *rest = arguments
    sys.path[0] = folder
    if environment.get(NO_FIGURES):
        importlib.import_module("fastil.reporting.figures").draw_run = lambda run: None
    sys.argv = [option, *rest]
    status = 0
    try:
        if option == "-m":
            runpy.run_module(code, run_name="__main__", alter_sys=True)
        else:
            sys.modules["__main__"] = types.ModuleType("__main__")
            exec(code, sys.modules["__main__"].__dict__)
    except SystemExit as end:
        status = end.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    # Not by the interpreter's end, which takes two seconds to free every object of the packages.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    forked = serve()
    if forked is not None:
        work(*forked)
