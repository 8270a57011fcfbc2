"""Small servers on this machine that answer as a test says, well or badly."""

from __future__ import annotations

import hashlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from avlm.config.data import Fetch
from avlm.data.fetching.fetch import Fetcher
from avlm.samples import MediaItem

Answer = bytes | Callable[[socket.socket], None]


def http(body: bytes = b"", status: str = "200 OK", *headers: str, length: int | None = -1) -> bytes:
    """A whole answer; ``length`` announces other than the body has, None announces nothing."""
    lines = [f"HTTP/1.1 {status}", *headers]
    if length is not None:
        lines.append(f"Content-Length: {len(body) if length < 0 else length}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def redirect(to: str) -> bytes:
    return http(b"", "302 Found", f"Location: {to}")


class Host:
    """A server.

    Attributes:
        port: Chosen by the system.
        asked: What each request was, in order.
    """

    def __init__(self, answers: Iterable[Answer] | Callable[[str], Answer], tls: ssl.SSLContext | None = None) -> None:
        self._answers = answers if callable(answers) else iter(answers)
        self._tls = tls
        self._lock = threading.Lock()
        self.asked: list[str] = []
        self.over = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._socket.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self.over.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _serve(self) -> None:
        while not self.over.is_set():
            try:
                sock, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._one, args=(sock,), daemon=True).start()

    def _one(self, sock: socket.socket) -> None:
        with suppress(OSError, StopIteration), sock:
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_side=True)
            with sock:
                head = b""
                while b"\r\n\r\n" not in head:
                    more = sock.recv(65536)
                    if not more:
                        return
                    head += more
                text = head.decode("latin-1")
                with self._lock:
                    self.asked.append(text)
                    answer = self._answers(text) if callable(self._answers) else next(self._answers)
                if callable(answer):
                    answer(sock)
                else:
                    sock.sendall(answer)


@contextmanager
def serving(answers: Iterable[Answer] | Callable[[str], Answer], tls: ssl.SSLContext | None = None) -> Iterator[Host]:
    host = Host(answers, tls)
    try:
        yield host
    finally:
        host.close()


def here(*names: str) -> Callable[[str, int], list[str]]:
    """A resolver that knows some names, all of them on this machine."""

    def resolve(name: str, port: int) -> list[str]:
        assert name in names, name
        return ["127.0.0.1"]

    return resolve


def settings(folder: Path, *hosts: Host, **given: Any) -> Fetch:
    """Settings under which servers of this machine may be asked, as `files.test`."""
    base: dict[str, Any] = {
        "schemes": ("http",),
        "private_hosts": ("files.test",),
        "ports": tuple(host.port for host in hosts),
        "folder": str(folder / "kept"),
        "wait_s": 0.0,
        "read_s": 5.0,
        "total_s": 20.0,
    }
    return Fetch(**{**base, **given})


def fetcher(folder: Path, *hosts: Host, waits: list[float] | None = None, **given: Any) -> Fetcher:
    """A fetcher that notes how long it would wait."""
    sleep = (lambda seconds: None) if waits is None else waits.append
    return Fetcher(settings(folder, *hosts, **given), resolve=here("files.test"), sleep=sleep)


def item(host: Host, path: str = "/a.png", name: str = "files.test") -> MediaItem:
    return MediaItem("image", url=f"http://{name}:{host.port}{path}")


def taken(fetcher: Fetcher, item: MediaItem) -> bytes:
    with fetcher.open(item) as file:
        return file.read()


def digests(given: Fetch, wanted: list[MediaItem], answers: Any) -> None:
    """The digests of what is fetched, into a queue: for a process of its own."""
    made = Fetcher(given, resolve=here("files.test"))
    answers.put([hashlib.sha256(taken(made, one)).hexdigest() for one in wanted])
