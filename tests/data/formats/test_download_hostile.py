"""Downloads from servers that mean harm: slow, endless, lying, leading elsewhere."""

import contextlib
import itertools
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from test_download import ARCHIVE, GOOD, check, publish

from fastil.data.formats import download as module
from fastil.data.formats.download import download
from fastil.errors import UserError
from fastil.text import CONTROLS

OK = b"HTTP/1.1 200 OK\r\n"
PAGE = b"<html>Accept our terms to use this network.</html>"


class Handler(BaseHTTPRequestHandler):
    """Writes what server.answer(handler, start) yields, a part at a time, until the client or the test has gone."""

    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.requests.append((self.path, asked))
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        with contextlib.suppress(OSError):
            for part in server.answer(self, start):
                if server.ended.is_set():
                    break
                self.wfile.write(part)
        self.close_connection = True

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    publish(monkeypatch, GOOD)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.answer, server.requests, server.ended = plain, [], threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/{ARCHIVE}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.ended.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(module, "STALL", 0.3)
    monkeypatch.setattr(module, "LEAST", 10_000)


def head(status, **headers):
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def plain(handler, start):
    if start:
        whole = f"bytes {start}-{len(GOOD) - 1}/{len(GOOD)}"
        yield head("206 Partial Content", Content_Range=whole, Content_Length=len(GOOD) - start)
    else:
        yield head("200 OK", Content_Length=len(GOOD))
    yield GOOD[start:]


def slowly(parts):
    for part in parts:
        time.sleep(0.02)
        yield part


def bytes_of(text):
    return (text[i : i + 1] for i in range(len(text)))


def slow_body(handler, start):
    first, rest = plain(handler, start)
    yield first
    yield rest[:100]
    yield from slowly(bytes_of(rest[100:]))


SLOW = {
    "body": slow_body,
    "body without a length": lambda handler, start: itertools.chain([OK + b"\r\n"], slowly(bytes_of(GOOD))),
    "status": lambda handler, start: slowly(bytes_of(b"HTTP/1.1 200 " + b"x" * 60_000)),
    "header": lambda handler, start: itertools.chain([OK], slowly(bytes_of(b"X: " + b"x" * 60_000))),
    "many headers": lambda handler, start: slowly(itertools.repeat(b"HTTP/1.1 100 Continue\r\n\r\n")),
    "length of a chunk": lambda handler, start: itertools.chain(
        [head("200 OK", Transfer_Encoding="chunked")], slowly(bytes_of(b"1;" + b"x" * 60_000))
    ),
    "end of a chunk": lambda handler, start: itertools.chain(
        [head("200 OK", Transfer_Encoding="chunked") + b"0\r\n"], slowly(itertools.repeat(b"X: y\r\n"))
    ),
    "nothing": lambda handler, start: slowly(itertools.repeat(b"")),
    "body of a redirect": lambda handler, start: itertools.chain(
        [head("302 Found", Location="/elsewhere")] if handler.path != "/elsewhere" else [],
        slowly(itertools.repeat(b"x")),
    ),
}


@pytest.mark.parametrize("answer", SLOW.values(), ids=SLOW)
def test_a_server_that_sends_a_byte_now_and_then_is_given_up(tmp_path, server, impatient, answer):
    server.answer = answer
    with pytest.raises(UserError, match=r"fewer than 10,000 bytes in 0.3 s; run the command again, it goes on"):
        download("cifar10", tmp_path, server.url)
    assert all(GOOD.startswith(path.read_bytes()) for path in tmp_path.iterdir())


def test_what_a_slow_server_has_sent_is_kept_and_the_next_call_goes_on_there(tmp_path, server, monkeypatch):
    server.answer = slow_body
    partial = tmp_path / f"{ARCHIVE}.partial"
    with monkeypatch.context() as patch:
        patch.setattr(module, "STALL", 0.3)
        sizes = [0]
        while len(sizes) < 20 and len(set(sizes)) < 3:  # on a busy machine not a byte may come in time
            with pytest.raises(UserError, match="fewer than"):
                download("cifar10", tmp_path, server.url)
            sizes.append(partial.stat().st_size if partial.exists() else 0)
    assert sizes == sorted(sizes)
    assert sizes[-1] >= 100
    assert GOOD.startswith(partial.read_bytes())
    server.answer = plain
    download("cifar10", tmp_path, server.url)
    check(tmp_path)
    assert server.requests[-1][1] == f"bytes={sizes[-1]}-"


def test_a_server_without_ranges_loses_nothing_that_came_before(tmp_path, server, impatient):
    partial = tmp_path / f"{ARCHIVE}.partial"
    partial.write_bytes(GOOD[:1000])
    server.answer = SLOW["body without a length"]
    with pytest.raises(UserError, match="fewer than"):
        download("cifar10", tmp_path, server.url)
    assert partial.read_bytes() == GOOD[:1000]


@pytest.mark.parametrize("good", [True, False])
def test_no_byte_beyond_the_published_size_is_written(tmp_path, server, monkeypatch, good):
    sizes = []
    monkeypatch.setattr(
        module,
        "md5_of",
        lambda path, of=module.md5_of: (sizes.append(path.stat().st_size) if path.exists() else 0, of(path))[1],
    )
    server.answer = lambda handler, start: itertools.chain(
        [OK + b"\r\n", GOOD if good else b""], itertools.repeat(b"x" * 50_000)
    )
    if good:
        download("cifar10", tmp_path, server.url)
        check(tmp_path)
    else:
        with pytest.raises(UserError, match=r"md5 .* the damaged file was removed"):
            download("cifar10", tmp_path, server.url)
        assert not list(tmp_path.iterdir())
    assert max(sizes) == len(GOOD)


OTHER = {
    "length": lambda handler, start: [head("200 OK", Content_Length=len(GOOD) + 1), GOOD + b"x"],
    "chunks": lambda handler, start: [
        head("200 OK", Transfer_Encoding="chunked"), b"%x\r\n%b\r\n0\r\n\r\n" % (len(PAGE), PAGE)
    ],
    "range": lambda handler, start: [
        head("206 Partial Content", Content_Range="bytes 1000-1999/2000", Content_Length=1000), b"x" * 1000
    ],
}  # fmt: skip


@pytest.mark.parametrize("answer", OTHER.values(), ids=OTHER)
def test_a_file_of_another_size_is_refused_and_what_came_before_kept(tmp_path, server, answer):
    server.answer = answer
    partial = tmp_path / f"{ARCHIVE}.partial"
    partial.write_bytes(GOOD[:1000])
    with pytest.raises(UserError, match=f"{server.url}: a file of .* and not of {len(GOOD):,}; try --url"):
        download("cifar10", tmp_path, server.url)
    assert partial.read_bytes() == GOOD[:1000]
    partial.unlink()
    if answer is not OTHER["range"]:
        with pytest.raises(UserError, match="a file of"):
            download("cifar10", tmp_path, server.url)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("said", ["", "bytes 1001-2000/*", "bytes 5-/9", "pages 1000-1999/2000", "bytes 1" + "0" * 99])
def test_a_range_that_was_not_asked_for_is_refused(tmp_path, server, said):
    partial = tmp_path / f"{ARCHIVE}.partial"
    partial.write_bytes(GOOD[:1000])
    server.answer = lambda handler, start: [head("206 Partial Content", Content_Range=said), b"x" * 1000]
    with pytest.raises(UserError, match=r"Content-Range .*, asked for 1000-; "):
        download("cifar10", tmp_path, server.url)
    assert partial.read_bytes() == GOOD[:1000]


@pytest.mark.parametrize("length", ["abc", "-5", "1e3", "\u00b2"])
@pytest.mark.parametrize("sent", [GOOD, GOOD[:5000]])
def test_a_length_that_is_no_number_is_as_good_as_none(tmp_path, server, length, sent):
    server.answer = lambda handler, start: [head("200 OK", Content_Length=length), sent]
    if sent == GOOD:
        download("cifar10", tmp_path, server.url)
        check(tmp_path)
        return
    with pytest.raises(UserError, match=f"broke off after 5000 of {len(GOOD)} bytes; run the command again"):
        download("cifar10", tmp_path, server.url)
    assert (tmp_path / f"{ARCHIVE}.partial").read_bytes() == sent


def test_416_on_a_fresh_start_and_on_a_resumed_one(tmp_path, server):
    server.answer = lambda handler, start: [head("416 Range Not Satisfiable")]
    with pytest.raises(UserError, match=f"{server.url}: 416 Range Not Satisfiable; try --url with a mirror"):
        download("cifar10", tmp_path, server.url)
    assert not list(tmp_path.iterdir())
    partial = tmp_path / f"{ARCHIVE}.partial"
    partial.write_bytes(GOOD[:1000])
    with pytest.raises(UserError, match=r"416 .* 1000 bytes .* \.partial file has; remove that, or try --url"):
        download("cifar10", tmp_path, server.url)
    assert partial.read_bytes() == GOOD[:1000]


@pytest.mark.parametrize(
    "to",
    [
        "file:///etc/hostname",
        "FILE:/etc/hostname",
        "ftp://127.0.0.1/x",
        "data:,x",
        "gopher://127.0.0.1/",
        "http://[::1",
    ],
)
def test_a_redirect_to_anything_but_http_is_refused(tmp_path, server, monkeypatch, to):
    monkeypatch.setenv("ftp_proxy", server.url)
    server.answer = lambda handler, start: [head("302 Found", Location=to)]
    with pytest.raises(UserError, match=rf"{server.url}: .*(not allowed|leads to none)"):
        download("cifar10", tmp_path, server.url)
    assert len(server.requests) == 1
    assert not list(tmp_path.iterdir())


def test_a_redirect_to_http_is_followed_and_an_endless_chain_is_not(tmp_path, server):
    def answer(handler, start):
        return plain(handler, start) if handler.path == "/there" else [head("301 Moved", Location="/there")]

    server.answer = answer
    partial = tmp_path / f"{ARCHIVE}.partial"
    partial.write_bytes(GOOD[:1000])
    download("cifar10", tmp_path, server.url)
    check(tmp_path)
    assert server.requests == [(f"/{ARCHIVE}", "bytes=1000-"), ("/there", "bytes=1000-")]
    numbers = itertools.count()
    server.answer = lambda handler, start: [head("301 Moved", Location=f"/{next(numbers)}")]
    with pytest.raises(UserError, match=r"301 .*loop"):
        download("cifar10", tmp_path / "other", server.url)


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/x", "data:,x", "//127.0.0.1/x", "http://"])
def test_an_address_is_one_of_http(tmp_path, url):
    with pytest.raises(UserError, match=f"{url}: not an address; --url needs one with http:// or https://"):
        download("cifar10", tmp_path, url)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("status", ["404 \x1b[2Jgone\x07", "302 \x9b31mmoved", "\x1b]0;x\x07", "200"])
def test_what_a_server_says_cannot_write_to_the_terminal(tmp_path, server, status):
    server.answer = lambda handler, start: [head(status, Location="file:///\x1b[2J", Content_Range="\x1b[2J")]
    with pytest.raises(UserError) as error:
        download("cifar10", tmp_path, server.url)
    assert not CONTROLS.search(str(error.value))
    assert "\n" not in str(error.value)
    assert status == "200" or "\\u00" in str(error.value) or "\\x" in str(error.value)
