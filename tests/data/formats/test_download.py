"""Downloads from a server on this machine that can misbehave in the ways servers do."""

import contextlib
import dataclasses
import hashlib
import io
import socket
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import typer

from fastil import cli_data
from fastil.data.formats import download as module
from fastil.data.formats.cifar import CIFAR10, CIFAR100
from fastil.data.formats.download import download
from fastil.errors import UserError

FILES = [file.name for file in (*CIFAR10.train, CIFAR10.test, CIFAR10.meta)]
FOLDER, ARCHIVE = CIFAR10.python_folder, CIFAR10.archive


def content_of(name):
    """Noise, which does not compress: a damaged byte of the archive is one of a file."""
    return np.random.default_rng(len(name) + name.encode()[-1]).bytes(20_000)


def archive_of(members):
    """A tar.gz of {name: bytes, or a TarInfo that is a link}."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


GOOD = archive_of({f"{FOLDER}/{name}": content_of(name) for name in FILES})


class Handler(BaseHTTPRequestHandler):
    """Serves server.body; server.behaviour says how, and server.requests remembers the Range of each request."""

    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.requests.append(asked)
        behaviour = server.behaviour(len(server.requests)) if callable(server.behaviour) else server.behaviour
        if behaviour == "gone":
            self.send_error(404, "Not Found")
            return
        if behaviour == "no HTTP at all":
            self.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n")
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and behaviour != "no ranges" else 0
        if start and start >= len(server.body):
            self.send_error(416, "Range Not Satisfiable")
            return
        rest = server.body[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.body) - 1}/{len(server.body)}")
        if behaviour == "breaks off a chunk":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n" % len(rest) + rest[: len(rest) // 2])
            return
        if behaviour != "no length":
            self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[: len(rest) // 2] if behaviour == "breaks off" else rest)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server of GOOD; its md5 and those of its files are the published ones for this test."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(module, "CHUNK", 4096)
    publish(monkeypatch, GOOD)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.body, server.behaviour, server.requests = GOOD, "plain", []
    server.url = f"http://127.0.0.1:{server.server_port}/{ARCHIVE}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def md5_of(raw):
    return hashlib.md5(raw, usedforsecurity=False).hexdigest()


def publish(monkeypatch, body):
    def summed(file):
        return file._replace(md5=md5_of(content_of(file.name)))

    small = dataclasses.replace(
        CIFAR10,
        train=tuple(map(summed, CIFAR10.train)),
        test=summed(CIFAR10.test),
        meta=summed(CIFAR10.meta),
        archive_md5=md5_of(body),
        archive_bytes=len(body),
    )
    monkeypatch.setitem(module.VARIANTS, "cifar10", small)


def unpack_by_hand(folder, without=None):
    (folder / FOLDER).mkdir()
    for name in FILES:
        if name != without:
            (folder / FOLDER / name).write_bytes(content_of(name))


def check(folder):
    """The data set is whole, and nothing half-done lies next to it."""
    assert {path.name: path.read_bytes() for path in (folder / FOLDER).iterdir()} == {n: content_of(n) for n in FILES}
    assert {path.name for path in folder.iterdir()} == {FOLDER, ARCHIVE}


@pytest.mark.parametrize("behaviour", ["plain", "no ranges", "no length"])
def test_a_download_is_unpacked_and_its_folder_returned(tmp_path, server, behaviour):
    server.behaviour = behaviour
    folder = tmp_path / "new" / "folder"
    assert download("cifar10", folder, server.url) == folder / FOLDER
    check(folder)
    assert server.requests == [None]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_without_a_mirror_the_archive_comes_from_the_authors_site(tmp_path, monkeypatch, name):
    asked = []

    def fetch(url, path, size, md5):
        asked.append((url, path.name, size, md5))
        raise UserError("enough")

    monkeypatch.setattr(module, "fetch", fetch)
    with pytest.raises(UserError, match="enough"):
        download(name, tmp_path)
    variant = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    archive = f"cifar-{name.removeprefix('cifar')}-python.tar.gz"
    assert asked == [
        (f"https://www.cs.toronto.edu/~kriz/{archive}", archive, variant.archive_bytes, variant.archive_md5)
    ]


@pytest.mark.parametrize("then", ["plain", "no ranges"])
def test_a_broken_download_goes_on_where_it_stopped(tmp_path, server, then):
    server.behaviour = lambda number: "breaks off" if number == 1 else then
    half = len(GOOD) // 2
    with pytest.raises(UserError, match=f"{server.url}.*{half} of {len(GOOD)} bytes; run the command again"):
        download("cifar10", tmp_path, server.url)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [GOOD[:half]]
    download("cifar10", tmp_path, server.url)
    check(tmp_path)
    assert server.requests == [None, f"bytes={half}-"]


def test_a_download_may_break_off_many_times(tmp_path, server):
    server.behaviour = lambda number: "breaks off" if number < 6 else "plain"
    for _ in range(5):
        with pytest.raises(UserError, match="run the command again"):
            download("cifar10", tmp_path, server.url)
    download("cifar10", tmp_path, server.url)
    check(tmp_path)
    starts = [int(asked.removeprefix("bytes=").removesuffix("-")) for asked in server.requests[1:]]
    assert len(set(starts)) == 5
    assert starts == sorted(starts)


def test_a_chunked_answer_that_breaks_off_goes_on_too(tmp_path, server):
    server.behaviour = lambda number: "breaks off a chunk" if number == 1 else "plain"
    with pytest.raises(UserError, match="run the command again"):
        download("cifar10", tmp_path, server.url)
    download("cifar10", tmp_path, server.url)
    check(tmp_path)


def test_a_partial_file_that_is_complete_already_is_used(tmp_path, server):
    (tmp_path / f"{ARCHIVE}.partial").write_bytes(GOOD)
    download("cifar10", tmp_path, server.url)
    check(tmp_path)
    assert not server.requests


@pytest.mark.parametrize("start", ["nothing", "a partial file of something else", "a partial file that is too long"])
def test_a_file_with_another_md5_is_removed_and_the_next_call_starts_afresh(tmp_path, server, start):
    partial = tmp_path / f"{ARCHIVE}.partial"
    if start == "nothing":
        server.body = GOOD[:-1] + bytes([GOOD[-1] ^ 1])
    else:
        partial.write_bytes(b"x" * (100 if start.endswith("else") else len(GOOD) + 1))
    with pytest.raises(UserError, match=md5_of(GOOD)):
        download("cifar10", tmp_path, server.url)
    assert not list(tmp_path.iterdir())
    server.body = GOOD
    download("cifar10", tmp_path, server.url)
    check(tmp_path)
    assert server.requests[-1] is None


def test_a_missing_page_names_its_address_and_leaves_nothing(tmp_path, server):
    server.behaviour = "gone"
    with pytest.raises(UserError, match=f"{server.url}: 404.*--url"):
        download("cifar10", tmp_path, server.url)
    assert not list(tmp_path.iterdir())


def test_a_missing_page_keeps_what_was_fetched_before(tmp_path, server):
    server.behaviour = "gone"
    (tmp_path / f"{ARCHIVE}.partial").write_bytes(GOOD[:1000])
    with pytest.raises(UserError, match="404"):
        download("cifar10", tmp_path, server.url)
    server.behaviour = "plain"
    download("cifar10", tmp_path, server.url)
    check(tmp_path)
    assert server.requests[-1] == "bytes=1000-"


def test_a_server_that_does_not_speak_http_is_named(tmp_path, server):
    server.behaviour = "no HTTP at all"
    with pytest.raises(UserError, match=server.url):
        download("cifar10", tmp_path, server.url)


def test_a_server_that_does_not_answer_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/{ARCHIVE}"
    with pytest.raises(UserError, match=f"{url}: .*refused"):
        download("cifar10", tmp_path, url)


@pytest.mark.parametrize("url", ["cifar-10-python.tar.gz", "http://127.0.0.1:1/two words", "http://[::1", "http:///x"])
def test_an_address_that_is_none_is_the_users_mistake(tmp_path, url):
    with pytest.raises(UserError) as error:
        download("cifar10", tmp_path, url)
    assert url in str(error.value)


def test_a_complete_data_set_is_not_fetched_again(tmp_path, server):
    unpack_by_hand(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / FOLDER).iterdir()}
    assert download("cifar10", tmp_path, server.url) == tmp_path / FOLDER
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / FOLDER).iterdir()} == times
    assert not server.requests


@pytest.mark.parametrize("missing", FILES)
def test_a_data_set_that_lacks_a_file_is_fetched(tmp_path, server, missing):
    unpack_by_hand(tmp_path, without=missing)
    download("cifar10", tmp_path, server.url)
    check(tmp_path)
    assert len(server.requests) == 1


@pytest.mark.parametrize("archive", [False, True])
def test_a_damaged_file_of_the_data_set_is_replaced(tmp_path, server, archive):
    # "Download it again" is what reading such a file says.
    unpack_by_hand(tmp_path)
    (tmp_path / FOLDER / "data_batch_2").write_bytes(content_of("data_batch_2")[:-1])
    if archive:
        (tmp_path / ARCHIVE).write_bytes(GOOD)
    download("cifar10", tmp_path, server.url)
    check(tmp_path)
    assert len(server.requests) == (0 if archive else 1)


def test_an_archive_that_is_there_is_unpacked_without_a_request(tmp_path, server):
    (tmp_path / ARCHIVE).write_bytes(GOOD)
    download("cifar10", tmp_path, server.url)
    check(tmp_path)
    assert not server.requests


def test_what_an_earlier_call_left_half_unpacked_is_cleared_away(tmp_path, server):
    staging = tmp_path / f"{ARCHIVE}.unpacking"
    (staging / FOLDER).mkdir(parents=True)
    (staging / FOLDER / "left over").write_bytes(b"x")
    download("cifar10", tmp_path, server.url)
    check(tmp_path)


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


ESCAPES = {
    "a path": {"../evil": b"out"},
    "a path within the folder": {f"{FOLDER}/../../evil": b"out"},
    "a link": {"l": link(f"{FOLDER}/train", "../../../evil")},
    "a link and a path through it": {"l": link(f"{FOLDER}/up", "../.."), f"{FOLDER}/up/evil": b"out"},
    "an absolute link": {"l": link(f"{FOLDER}/train", "/etc/hostname")},
    "a hard link": {"l": link(f"{FOLDER}/train", "../../secret", tarfile.LNKTYPE)},
    "a device": {"l": link(f"{FOLDER}/train", "", tarfile.CHRTYPE)},
}


@pytest.mark.parametrize("members", ESCAPES.values(), ids=ESCAPES)
def test_an_archive_that_leads_outside_is_refused(tmp_path, server, monkeypatch, members):
    (tmp_path / "secret").write_bytes(b"secret")
    server.body = archive_of({f"{FOLDER}/{name}": content_of(name) for name in FILES} | members)
    publish(monkeypatch, server.body)
    folder = tmp_path / "downloads"
    with pytest.raises(UserError, match=ARCHIVE):
        download("cifar10", folder, server.url)
    assert not list(tmp_path.rglob("evil"))
    assert not (folder / FOLDER).exists()
    assert {path.name for path in tmp_path.iterdir()} == {"secret", "downloads"}


def overwritten(raw):
    middle = len(raw) // 2
    return raw[:middle] + b"\xff" * 500 + raw[middle + 500 :]


DAMAGED = {
    "cut short": GOOD[: len(GOOD) // 2],
    "damaged where it was stored as it is": overwritten(GOOD),
    "damaged where it was compressed": overwritten(
        archive_of({f"{FOLDER}/{name}": content_of(name).hex().encode() for name in FILES})
    ),
    "empty": b"",
    "a page": b"<html>Too many requests</html>",
    "another data set": archive_of({"cifar-100-python/train": b"x"}),
}


@pytest.mark.parametrize("raw", DAMAGED.values(), ids=DAMAGED)
def test_an_archive_of_the_users_own_that_is_damaged_is_named(tmp_path, server, raw):
    (tmp_path / ARCHIVE).write_bytes(raw)
    with pytest.raises(UserError, match=str(tmp_path / ARCHIVE)):
        download("cifar10", tmp_path, server.url)
    assert not (tmp_path / FOLDER).exists()
    (tmp_path / ARCHIVE).unlink()
    download("cifar10", tmp_path, server.url)
    check(tmp_path)


@pytest.mark.parametrize("name", ["cifar", "CIFAR10", "imagenet", ""])
def test_an_unknown_name_lists_the_known_ones(tmp_path, name):
    with pytest.raises(UserError, match="cifar10, cifar100"):
        download(name, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_folder_that_is_a_file_is_named(tmp_path, server):
    (tmp_path / "place").write_bytes(b"")
    with pytest.raises(UserError, match=str(tmp_path / "place")):
        download("cifar10", tmp_path / "place", server.url)


@pytest.mark.parametrize("moment", ["receiving", "before the first byte"])
def test_a_stopped_download_says_what_is_kept_and_how_to_go_on(tmp_path, server, monkeypatch, capsys, moment):
    """Ctrl-C ended it without a word."""
    half = len(GOOD) // 2
    partial = tmp_path / f"{ARCHIVE}.partial"
    advance = module.Bar.advance

    def stop(bar, count):
        advance(bar, count)
        if moment != "receiving" or partial.stat().st_size >= half:
            raise KeyboardInterrupt

    monkeypatch.setattr(module.Bar, "advance", stop)
    if moment != "receiving":
        monkeypatch.setattr(module, "pieces", lambda url, start: (piece for piece in [module.Piece(0, len(GOOD), b"")]))
    with pytest.raises(typer.Exit) as stopped:
        cli_data.download("cifar10", tmp_path, server.url)
    assert stopped.value.exit_code == 130
    said = capsys.readouterr().err
    if moment == "receiving":
        size = partial.stat().st_size
        assert said == f"stopped; {partial} keeps the {size:,} bytes that have come, and the same command goes on\n"
        assert GOOD.startswith(partial.read_bytes())
    else:
        assert said == "stopped; the same command goes on\n"
        assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    publish(monkeypatch, GOOD)
    download("cifar10", tmp_path, server.url)
    check(tmp_path)
