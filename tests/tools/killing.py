"""Conversions that are killed: at a call of the system in a copy of this process, or at any moment as a process."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import environment
from converting import encoded, left_of, photo, write
from making import tar_bytes, write_tar

from fastil.tools import files as tool_files
from fastil.tools import journal as tool_journal

# Tells each stage as it begins, so that the moment of a kill can be chosen.
DRIVER = """
import json
import signal
import sys
from pathlib import Path
from fastil.tools.convert import convert, options_of
from fastil.tools.reporting import Reporter

class Stages(Reporter):
    def begin(self, stage, *others):
        super().begin(stage, *others)
        print("stage", stage, flush=True)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background would hand down its own
    options = options_of(**json.loads(sys.argv[3]))
    print("stage begin", flush=True)
    convert(Path(sys.argv[1]), Path(sys.argv[2]), options, Stages(), commit_bytes=1 << 16)
"""
INTERRUPTED = 3  # exit status
CLASSES = ("cat", "dog")


def without(folder):
    """A new, empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


# Sources with two splits


def images(count):
    """By split, class and file name: so many JPEGs of each class in train, half as many in val, and in both splits
    grayscale and lossless images and two that cannot be read, by their header and by what comes after it."""
    found, cut = {}, encoded(photo(60, 60))
    for split, number in (("train", count), ("val", count // 2)):
        for seed, name in enumerate(CLASSES):
            of_class = {f"{i:03d}.jpg": encoded(photo(20, 30, 10 * i + seed)) for i in range(number)}
            of_class["grey.jpg"] = encoded(photo(20, 30, seed)[..., 0])
            of_class["large.png"] = encoded(photo(10, 100, seed), "PNG")
            of_class["bad.jpg"] = cut[: len(cut) * 2 // 3] if seed else b"no image"
            found |= {(split, name, file): content for file, content in of_class.items()}
    return found


def folder_of(root, found):
    return write(root, {"/".join(place): content for place, content in found.items()})


def tar_of(root, found):
    return write_tar(root / "in.tar", {"/".join(place): content for place, content in found.items()})


def flat_of(root, found):
    """Its validation images lie in one folder, with a list."""
    rows, files = ["ImageId,PredictionString"], {}
    for (split, name, file), content in found.items():
        if split == "val":
            rows.append(f"{name}_{file},{name} 1 2 3 4")
        files[f"train/{name}/{file}" if split == "train" else f"val/{name}_{file}"] = content
    return write(root, files | {"LOC_val_solution.csv": "\n".join(rows).encode()})


def parquet_of(root, found):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    root.mkdir()
    for split in ("train", "val"):
        rows = [(name, file, content) for (one, name, file), content in found.items() if one == split][::-1]
        table = {
            "image": [{"bytes": content, "path": f"{name}/{file}"} for name, file, content in rows],
            "label": [CLASSES.index(name) for name, _, _ in rows],
        }
        parquet.write_table(pa.table(table), root / f"{split}.parquet", row_group_size=2)
    return root


def webdataset_of(root, found):
    for split in ("train", "val"):
        rows = [(name, file, content) for (one, name, file), content in found.items() if one == split]
        members = {}
        for number, (name, file, content) in enumerate(rows):
            members[f"{number:04d}{file[-4:]}"] = content
            members[f"{number:04d}.cls"] = str(CLASSES.index(name)).encode()
        write(root, {f"{split}-0000.tar": tar_bytes(members)})
    return root


KINDS = {
    "folder": folder_of, "tar": tar_of, "flat": flat_of, "parquet": parquet_of, "webdataset": webdataset_of,
}  # fmt: skip


# At a call of the system


class Deadly:
    """Ends this process at its so-many-th call of the system, before it, after it, or in the middle of a write.

    calls: the names of those that count, None: all. end: SIGKILL, or SIGINT for what Ctrl-C does.
    """

    def __init__(self, at, calls=None, end=signal.SIGKILL):
        self.at, self.calls, self.end = at, calls, end

    def tick(self, name, torn=None):
        if self.calls is not None and name not in self.calls:
            return
        self.at -= 1
        if self.at == 0:
            if torn is not None:
                torn()
            if self.end == signal.SIGINT:
                raise KeyboardInterrupt
            os.kill(os.getpid(), self.end)

    def around(self, name, work):
        def call(*arguments, **options):
            self.tick(name)
            result = work(*arguments, **options)
            self.tick(name)
            return result

        return call

    def install(self):
        deadly = self

        class Torn(tool_files.WholeWrites):
            def write(self, content):
                deadly.tick("write", lambda: super(Torn, self).write(bytes(content)[: len(content) // 2]))
                return super().write(content)

        def opened(path, mode):
            return io.BufferedWriter(Torn(path, mode.replace("b", ""))) if mode == "ab" else open(path, mode)

        tool_files.WholeWrites = Torn
        tool_journal.open = opened
        os.fsync = self.around("fsync", lambda descriptor: None)
        for name in ("replace", "truncate", "unlink"):
            setattr(os, name, self.around(name, getattr(os, name)))


def survived(work, *deadly):
    """Whether the work ends in a copy of this process that is to be ended so (arguments of Deadly)."""
    child = os.fork()
    if child == 0:
        try:
            Deadly(*deadly).install()
            work()
        except KeyboardInterrupt:
            os._exit(INTERRUPTED)
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) in (0, INTERRUPTED)
    return status == 0


# At any moment


def begun(driver, source, out, **options):
    """A conversion in a process of its own. driver: a file of DRIVER."""
    return subprocess.Popen(
        [sys.executable, str(driver), str(source), str(out), json.dumps(options)], env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip


def stages_of(process):
    """The names of the stages as they begin."""
    for line in process.stdout:
        if line.startswith("stage "):
            yield line.removeprefix("stage ").strip()


def killed(process, stage, seconds, number):
    """End it and its workers by a signal, so long after the beginning of the stage of this number; returns whether it
    had not ended by then."""
    for at, _ in enumerate(stages_of(process)):
        if at == stage:
            break
    time.sleep(seconds)
    in_time = process.poll() is None
    if in_time:
        os.killpg(process.pid, number)
    process.communicate()
    assert left_of(process, 60) == []
    return in_time
