# ruff: noqa: E501 (whole messages are compared)
"""Media by URL, from servers on this machine that answer well and badly."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import multiprocessing
import os
import pickle
import socket
import ssl
import subprocess
import threading
import time
import tracemalloc
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from avlm.config.data import DataConfig, Fetch
from avlm.config.media import MediaSpec, VisionSpec
from avlm.data.decoding.decode import decode_image
from avlm.data.decoding.doors import Doors, doors_of
from avlm.data.decoding.files import Limits, opened
from avlm.data.fetching.fetch import Fetcher
from avlm.data.fetching.web import wait_of
from avlm.data.media.reader import MediaReader
from avlm.errors import ConfigError, MediaError, MissingExtraError
from avlm.samples import MediaItem
from tests.data.hosts import digests, fetcher, here, http, item, redirect, serving, settings, taken

BODY = bytes(range(256)) * 40


def refusal(made: Fetcher, wanted: MediaItem) -> str:
    with pytest.raises(MediaError) as error:
        made.open(wanted)
    return str(error.value)


def drip(head: bytes, every_s: float, over: Callable[[], bool]) -> Callable[[socket.socket], None]:
    def answer(sock: socket.socket) -> None:
        sock.sendall(head)
        while not over():
            sock.sendall(b"x")
            time.sleep(every_s)

    return answer


# ---------------------------------------------------------------- what comes, and what is kept


def test_a_file_comes_once_and_is_then_read_from_the_folder(tmp_path: Path) -> None:
    with serving([http(BODY)]) as host:
        made = fetcher(tmp_path, host)
        assert taken(made, item(host)) == BODY
        assert taken(made, item(host)) == BODY
        with made.open(item(host)) as file:  # decoders seek
            assert file.seek(-6, io.SEEK_END) == len(BODY) - 6
            assert file.read(100) == BODY[-6:]
            file.seek(256)
            assert file.read(3) == b"\x00\x01\x02"
    assert len(host.asked) == 1


def test_a_request_says_no_more_than_it_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens
    with serving([http(BODY, "200 OK", "Set-Cookie: a=b"), http(BODY)]) as host:
        made = fetcher(tmp_path, host)
        taken(made, item(host, "/ü b?x=1#part"))
        taken(made, item(host, "/second"))
    assert host.asked[0] == (
        f"GET /%C3%BC%20b?x=1 HTTP/1.1\r\nHost: files.test:{host.port}\r\nUser-Agent: avlm\r\nAccept: */*\r\n"
        "Accept-Encoding: identity\r\nConnection: close\r\n\r\n"
    )
    assert "Cookie" not in host.asked[1]


def test_urls_do_not_share_what_is_kept(tmp_path: Path) -> None:
    with serving(lambda asked: http(asked.split()[1].encode())) as host:
        made = fetcher(tmp_path, host)
        for _ in range(2):
            for path in ("/a", "/A", "/a?", "/a?b", "/a/", "/a%20", "/b"):
                assert taken(made, item(host, path)) == path.encode()
    assert len(host.asked) == 7


def test_a_chunked_body_comes_whole(tmp_path: Path) -> None:
    chunks = b"".join(b"%x\r\n%s\r\n" % (n, BODY[:n]) for n in (1, 5, 10_000)) + b"0\r\n\r\n"
    with serving([http(chunks, "200 OK", "Transfer-Encoding: chunked", length=None)]) as host:
        assert taken(fetcher(tmp_path, host), item(host)) == BODY[:1] + BODY[:5] + BODY[:10_000]


def test_an_empty_file_is_not_kept(tmp_path: Path) -> None:
    with serving([http(b""), http(BODY)]) as host:
        made = fetcher(tmp_path, host)
        assert refusal(made, item(host)).endswith("is empty, so there is nothing to decode. Correct its URL")
        assert taken(made, item(host)) == BODY


# ---------------------------------------------------------------- too much, too slow, too little


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(http(BODY), id="announced"),
        pytest.param(http(BODY, length=None), id="not announced"),
        pytest.param(http(b"2800\r\n" + BODY + b"\r\n0\r\n\r\n", "200 OK", "Transfer-Encoding: chunked", length=None), id="chunked"),
        pytest.param(http(b"fffffffffffffff\r\n" + BODY * 20, "200 OK", "Transfer-Encoding: chunked", length=None), id="a chunk of an exabyte"),
        pytest.param(http(b"", length=10**18), id="an exabyte announced"),
    ],
)  # fmt: skip
def test_what_is_too_large_is_given_up(tmp_path: Path, answer: bytes) -> None:
    with serving([answer] * 2) as host:
        made = fetcher(tmp_path, host, max_bytes=10_000, retries=0)
        assert refusal(made, item(host)) == (
            f"http://files.test:{host.port}/a.png: has more than 10000 bytes, which are the most that are fetched. "
            "Raise data.fetch.max_bytes, or give a smaller file"
        )
        assert not [p for p in (tmp_path / "kept").rglob("*") if p.is_file()]


def test_a_chunk_of_less_than_nothing_is_no_way_past_the_size(tmp_path: Path) -> None:
    """The standard library reads a chunk of -1 bytes to the end of the connection, all at once, if it is let."""
    answer = http(b"-1\r\n" + bytes(30_000_000), "200 OK", "Transfer-Encoding: chunked", length=None)
    with serving([answer]) as host:
        made = fetcher(tmp_path, host, max_bytes=10**6, retries=0)
        tracemalloc.start()
        assert "the connection broke" in refusal(made, item(host))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert most < 5_000_000


def test_the_largest_size_allowed_is_allowed(tmp_path: Path) -> None:
    with serving([http(BODY)]) as host:
        assert taken(fetcher(tmp_path, host, max_bytes=len(BODY)), item(host)) == BODY


@pytest.mark.parametrize(
    "head", [http(b"", length=10**6), b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 "], ids=["body", "header", "status"]
)
def test_a_host_that_sends_a_byte_at_a_time_is_given_up_in_time(tmp_path: Path, head: bytes) -> None:
    with serving(lambda _: drip(head, 0.02, host.over.is_set)) as host:
        made = fetcher(tmp_path, host, read_s=5.0, total_s=0.4)
        began = time.monotonic()
        assert "did not come in time" in refusal(made, item(host))
        assert time.monotonic() - began < 2.0


def test_a_silent_host_is_tried_again(tmp_path: Path) -> None:
    with serving(lambda _: (lambda sock: host.over.wait(5)) if len(host.asked) == 1 else http(BODY)) as host:
        assert taken(fetcher(tmp_path, host, read_s=0.2), item(host)) == BODY
    assert len(host.asked) == 2


def test_a_resolver_that_hangs_is_given_up_in_time(tmp_path: Path) -> None:
    over = threading.Event()

    def hang(name: str, port: int) -> list[str]:
        over.wait(10)
        return []

    made = Fetcher(settings(tmp_path, total_s=0.2), resolve=hang)
    began = time.monotonic()
    assert "did not come in time" in refusal(made, MediaItem("image", url="http://files.test/a.png"))
    assert time.monotonic() - began < 2.0
    over.set()


@pytest.mark.parametrize(
    "answer",
    [http(BODY[:100], length=len(BODY)), http(b"64\r\nabc", "200 OK", "Transfer-Encoding: chunked", length=None)],
)
def test_what_is_cut_off_is_tried_again_and_never_kept(tmp_path: Path, answer: bytes) -> None:
    with serving([answer, http(BODY)]) as host:
        assert taken(fetcher(tmp_path, host), item(host)) == BODY
    with serving([answer] * 3) as host:
        message = refusal(fetcher(tmp_path, host, retries=2), item(host))
        assert (
            "is cut off: 10240 bytes were announced and 100 came" in message
            or "the connection broke (IncompleteRead)" in message
        )
        assert len(host.asked) == 3
        assert len([p for p in (tmp_path / "kept").rglob("*") if p.is_file()]) == 1  # that of the first host


# ---------------------------------------------------------------- tries and waits


def test_a_host_under_load_is_tried_again_after_what_it_asks_for(tmp_path: Path) -> None:
    waits: list[float] = []
    busy = http(b"", "429 Too Many Requests", "Retry-After: 7")
    with serving([busy, http(b"", "503 Unavailable"), http(BODY)]) as host:
        assert taken(fetcher(tmp_path, host, waits=waits, wait_s=2.0), item(host)) == BODY
    assert waits[0] == 7
    assert 2 <= waits[1] <= 4  # the second wait is twice the first, and a random part of it


def test_faults_of_a_server_are_told_when_they_last(tmp_path: Path) -> None:
    waits: list[float] = []
    with serving([http(b"secret words", "500 Internal <b>oops</b>")] * 5) as host:
        message = refusal(fetcher(tmp_path, host, waits=waits, wait_s=1.0, retries=2), item(host))
        assert message == (
            f"http://files.test:{host.port}/a.png: is not given by its host (status 500). "
            "Correct its URL, or remove it from the sample"
        )
    assert len(host.asked) == 3
    assert 0.5 <= waits[0] <= 1 and 1 <= waits[1] <= 2


@pytest.mark.parametrize(
    "status",
    [
        "404 Not Found",
        "403 Forbidden",
        "401 Unauthorized",
        "204 No Content",
        "206 Partial Content",
        "304 Not Modified",
        "501 No",
    ],
)
def test_what_does_not_pass_is_not_tried_again(tmp_path: Path, status: str) -> None:
    with serving([http(BODY, status)] * 2) as host:
        assert f"(status {status[:3]})" in refusal(fetcher(tmp_path, host), item(host))
    assert len(host.asked) == 1


def test_a_host_that_asks_for_too_long_a_wait_is_not_waited_for(tmp_path: Path) -> None:
    waits: list[float] = []
    with serving([http(b"", "429 Too Many", "Retry-After: 3600")]) as host:
        message = refusal(fetcher(tmp_path, host, waits=waits), item(host))
    assert message.endswith(
        "is not given by its host now, which asks to wait 3600 s. Start the command again then, or raise data.fetch.max_wait_s"
    )
    assert not waits
    with serving([http(b"", "429 Too Many", "Retry-After: 50")]) as host:  # within max_wait_s and beyond total_s
        assert "(status 429)" in refusal(fetcher(tmp_path, host, waits=waits, total_s=5.0), item(host))
    assert not waits


def test_waits_are_read_as_numbers_and_as_dates() -> None:
    now = 1_700_000_000.0
    assert wait_of("120", now) == 120
    assert wait_of(formatdate(now + 90, usegmt=True), now) == 90
    assert wait_of(formatdate(now - 90, usegmt=True), now) == 0
    for text in (None, "", "soon", "-5", "1e9", "９", "Fri, 99 Foo 2020 99:99:99 GMT"):
        assert wait_of(text, now) == 0


def test_packed_answers_are_refused(tmp_path: Path) -> None:
    bomb = gzip.compress(bytes(10**6))
    for header in ("Content-Encoding: gzip", "Content-Encoding: br", "Transfer-Encoding: gzip, chunked"):
        with serving([http(bomb, "200 OK", header)]) as host:
            message = refusal(fetcher(tmp_path, host), item(host))
            assert message.endswith("is sent packed, which was not asked for. Download it and give its path")
    with serving([http(BODY, "200 OK", "Content-Encoding: identity")]) as host:
        assert taken(fetcher(tmp_path, host), item(host)) == BODY


@pytest.mark.parametrize(
    "noise",
    [
        b"",
        b"\x00\x01",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"SSH-2.0-x\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 500 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
    ],
)
def test_what_is_no_http_is_told_in_our_words(tmp_path: Path, noise: bytes) -> None:
    with serving([noise]) as host:
        message = refusal(fetcher(tmp_path, host, retries=0), item(host))
    assert "did not come, as the connection broke (" in message


# ---------------------------------------------------------------- redirects


def test_redirects_are_followed_so_many_times(tmp_path: Path) -> None:
    def answer(asked: str) -> bytes:
        number = int(asked.split()[1][1:])
        return redirect(f"/{number - 1}") if number else http(BODY)

    with serving(answer) as host:
        assert taken(fetcher(tmp_path, host, redirects=3), item(host, "/3")) == BODY
        assert "is redirected more than 3 times" in refusal(fetcher(tmp_path, host, redirects=3), item(host, "/4"))
        assert "is redirected more than 0 times" in refusal(fetcher(tmp_path, host, redirects=0), item(host, "/1"))


@pytest.mark.parametrize(
    ("location", "told"),
    [
        ("http://other.test/x", "is on other.test, which is none of the hosts that may be asked"),
        ("//other.test/x", "is on other.test, which is none of the hosts that may be asked"),
        ("http://169.254.169.254/latest/meta-data", "is on 169.254.169.254, which is none of the hosts that may be asked"),
        ("http://open.test/x", "is on open.test, whose address is not one of the public internet"),
        ("http://files.test:1/x", "is at port 1, and that of http is 80"),
        ("https://files.test/x", "is at https://, and http may be fetched"),
        ("file:///etc/passwd", "is at file://, which is not fetched"),
        ("s3://bucket/x", "is redirected to s3://, which is not followed"),
        ("ftp://files.test/x", "is at ftp://, which is not fetched"),
        ("http://files.test\\@other.test/", "has a backslash"),
        ("http://a@files.test/", "has a user or a password in its URL"),
        ("http://[::1/", "is redirected to what is no URL"),
        ("http://0x7f.1/", "which is no IPv4 address"),
        ("http://a\x01b/", "control character"),
    ],
)  # fmt: skip
def test_each_redirect_passes_the_same_check(tmp_path: Path, location: str, told: str) -> None:
    with serving([redirect(location)] * 2) as host:
        made = Fetcher(
            settings(tmp_path, host, hosts=("open.test",)),
            resolve=here("files.test", "open.test"),
            sleep=lambda s: None,
        )
        assert told in refusal(made, item(host))
    assert len(host.asked) == 1


def test_what_is_kept_is_given_only_while_all_who_gave_it_may_be_asked(tmp_path: Path) -> None:
    with serving(
        lambda asked: http(BODY) if "inner.test" in asked else redirect(f"http://inner.test:{host.port}/x")
    ) as host:
        both = Fetcher(
            settings(tmp_path, host, private_hosts=("files.test", "inner.test")),
            resolve=here("files.test", "inner.test"),
        )
        assert taken(both, item(host)) == BODY
        assert taken(both, item(host)) == BODY
        assert len(host.asked) == 2
        closed = Fetcher(settings(tmp_path, host, hosts=("inner.test",)), resolve=here("files.test", "inner.test"))
        assert "inner.test, whose address is not one of the public internet" in refusal(closed, item(host))
        assert taken(both, item(host)) == BODY


# ---------------------------------------------------------------- names that lie


def test_a_name_is_resolved_once_and_the_connection_goes_where_the_check_went(tmp_path: Path) -> None:
    answers = iter([["93.184.216.34"], ["127.0.0.1"]])
    asked: list[str] = []

    def resolve(name: str, port: int) -> list[str]:
        asked.append(name)
        return next(answers)

    went: list[tuple[str, int]] = []

    with serving([http(BODY)]) as host:

        def connect(address: str, port: int, timeout_s: float) -> socket.socket:
            went.append((address, port))
            return socket.create_connection(("127.0.0.1", host.port))

        made = Fetcher(settings(tmp_path, hosts=("*",), private_hosts=()), resolve=resolve, connect=connect)
        assert taken(made, MediaItem("image", url="http://turns.example/a")) == BODY
        assert went == [("93.184.216.34", 80)]
        assert asked == ["turns.example"]
        assert "turns.example, whose address is not one of the public internet" in refusal(
            made, MediaItem("image", url="http://turns.example/b")
        )
    assert len(went) == 1


def test_a_name_with_one_private_address_among_public_ones_is_refused(tmp_path: Path) -> None:
    def never(address: str, port: int, timeout_s: float) -> socket.socket:
        raise AssertionError(address)

    made = Fetcher(
        settings(tmp_path, hosts=("*",), private_hosts=()),
        resolve=lambda name, port: ["93.184.216.34", "10.0.0.1"],
        connect=never,
    )
    assert "is not one of the public internet" in refusal(made, MediaItem("image", url="http://mixed.example/"))


def test_the_next_address_is_tried_where_the_first_takes_no_connection(tmp_path: Path) -> None:
    went: list[str] = []
    with serving([http(BODY)]) as host:

        def connect(address: str, port: int, timeout_s: float) -> socket.socket:
            went.append(address)
            if len(went) == 1:
                raise ConnectionRefusedError
            return socket.create_connection(("127.0.0.1", host.port))

        made = Fetcher(
            settings(tmp_path, hosts=("*",)),
            resolve=lambda name, port: ["2606:4700::1", "93.184.216.34"],
            connect=connect,
        )
        assert taken(made, MediaItem("image", url="http://two.example/")) == BODY
    assert went == ["2606:4700::1", "93.184.216.34"]


def test_nobody_at_a_port_is_told(tmp_path: Path) -> None:
    with serving([]) as host:
        pass
    waits: list[float] = []
    assert "the connection broke (ConnectionRefusedError)" in refusal(fetcher(tmp_path, host, waits=waits), item(host))
    assert len(waits) == 3


# ---------------------------------------------------------------- certificates


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificate")
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "30",
    ]
    command += ["-subj", "/CN=files.test", "-addext", "subjectAltName=DNS:files.test"]
    try:
        subprocess.run([*command, "-keyout", folder / "key", "-out", folder / "cert"], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs the openssl program, to make a certificate")
    return folder


def test_certificates_are_checked_against_the_name(tmp_path: Path, certificate: Path) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate / "cert", certificate / "key")
    trusting = ssl.create_default_context(cafile=str(certificate / "cert"))
    with serving(lambda _: http(BODY), tls) as host:

        def ask(name: str, trust: ssl.SSLContext | None) -> Fetcher:
            given = settings(tmp_path, host, schemes=("https",), private_hosts=("*.test",))
            return Fetcher(given, resolve=lambda n, port: ["127.0.0.1"], tls=trust, sleep=lambda s: None)

        def url(name: str) -> MediaItem:
            return MediaItem("image", url=f"https://{name}:{host.port}/a")

        assert taken(ask("files.test", trusting), url("files.test")) == BODY
        for name, trust in (("other.test", trusting), ("www.test", None)):
            assert "is on a host whose certificate is not one for its name that an authority signed" in refusal(
                ask(name, trust), url(name)
            )
    assert len(host.asked) == 1


# ---------------------------------------------------------------- many at once


def test_threads_that_want_one_url_get_it_whole_and_leave_one_file(tmp_path: Path) -> None:
    with serving(lambda _: http(BODY)) as host:
        made = fetcher(tmp_path, host)
        found: list[bytes] = []
        threads = [threading.Thread(target=lambda: found.append(taken(made, item(host)))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert found == [BODY] * 8
    assert len([p for p in (tmp_path / "kept").rglob("*") if p.is_file()]) == 1


def test_no_more_downloads_are_under_way_than_allowed(tmp_path: Path) -> None:
    now, most, lock = 0, 0, threading.Lock()

    def answer(sock: socket.socket) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.03)
        with lock:
            now -= 1
        sock.sendall(http(BODY))

    with serving(lambda _: answer) as host:
        made = fetcher(tmp_path, host, at_once=2)
        threads = [threading.Thread(target=taken, args=(made, item(host, f"/{i}"))) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert most == 2


def test_processes_share_a_folder(tmp_path: Path) -> None:
    body = np.random.default_rng(0).bytes(3_000_000)
    with serving(lambda asked: http(asked.split()[1].encode() + body)) as host:
        made = settings(tmp_path, host, cache_mb=10)
        wanted = [item(host, f"/{i % 5}") for i in range(15)]
        context = multiprocessing.get_context("fork")
        answers = context.Queue()
        processes = [context.Process(target=digests, args=(made, wanted, answers)) for _ in range(2)]
        for process in processes:
            process.start()
        found = [answers.get(timeout=60) for _ in processes]
        for process in processes:
            process.join(20)
    expected = [hashlib.sha256(f"/{i % 5}".encode() + body).hexdigest() for i in range(15)]
    assert found == [expected, expected]
    kept = [p.stat().st_size for p in (tmp_path / "kept").rglob("*") if p.is_file()]
    assert 0 < sum(kept) <= 10 * 2**20


def test_a_fetcher_travels_to_another_process(tmp_path: Path) -> None:
    made = pickle.loads(pickle.dumps(Fetcher(settings(tmp_path))))
    assert made.settings == settings(tmp_path)
    assert len(pickle.dumps(made)) < 2000


# ---------------------------------------------------------------- the folder


def kept_file(folder: Path) -> Path:
    (found,) = [p for p in (folder / "kept").rglob("*") if p.is_file()]
    return found


@pytest.mark.parametrize("how", ["flipped", "shortened", "emptied", "other", "noise", "link"])
def test_what_was_damaged_is_thrown_away_and_fetched_again(tmp_path: Path, how: str) -> None:
    with serving(lambda asked: http(asked.split()[1].encode() + BODY)) as host:
        made = fetcher(tmp_path, host)
        assert taken(made, item(host, "/a")) == b"/a" + BODY
        path = kept_file(tmp_path)
        data = path.read_bytes()
        if how == "flipped":
            path.write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:])
        elif how == "shortened":
            path.write_bytes(data[:-1])
        elif how == "emptied":
            path.write_bytes(b"")
        elif how == "noise":
            path.write_bytes(os.urandom(5000))
        elif how == "link":
            (tmp_path / "elsewhere").write_bytes(data)
            path.unlink()
            path.symlink_to(tmp_path / "elsewhere")
        else:  # whole, and of another URL
            path.unlink()
            assert taken(made, item(host, "/b")) == b"/b" + BODY
            kept_file(tmp_path).rename(path)
        before = len(host.asked)
        assert taken(made, item(host, "/a")) == b"/a" + BODY
        assert taken(made, item(host, "/a")) == b"/a" + BODY
        assert len(host.asked) == before + 1


def test_what_was_longest_not_used_goes_first(tmp_path: Path) -> None:
    body = bytes(300_000)
    with serving(lambda _: http(body)) as host:
        made = fetcher(tmp_path, host, cache_mb=1)  # room for three of them
        for name in ("/1", "/2", "/3", "/1", "/4"):
            taken(made, item(host, name))
            time.sleep(0.02)
        assert [a.split()[1] for a in host.asked] == ["/1", "/2", "/3", "/4"]
        for name in ("/1", "/3", "/4"):
            taken(made, item(host, name))
        assert len(host.asked) == 4
        taken(made, item(host, "/2"))
        assert len(host.asked) == 5
    kept = [p.stat().st_size for p in (tmp_path / "kept").rglob("*") if p.is_file()]
    assert len(kept) == 3 and sum(kept) <= 2**20


def test_what_is_larger_than_the_folder_may_be_is_read_and_not_kept(tmp_path: Path) -> None:
    body = bytes(2**20 + 1)
    with serving(lambda _: http(body)) as host:
        for size in (1, 0):
            assert taken(fetcher(tmp_path, host, cache_mb=size), item(host)) == body
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kept" / "ab").mkdir(parents=True)
    (tmp_path / "kept" / "new").mkdir()
    mine = [tmp_path / "kept" / name for name in ("ab/thesis.tex", "new/thesis.tex", "thesis.tex")]
    for path in mine:
        path.write_bytes(bytes(2**20))
        os.utime(path, (0, 0))
    stale = tmp_path / "kept" / "new" / "avlm-draft-x"
    stale.write_bytes(b"of a process that was killed")
    os.utime(stale, (0, 0))
    with serving(lambda _: http(BODY)) as host:
        taken(fetcher(tmp_path, host, cache_mb=1), item(host))
    assert all(path.exists() for path in mine)
    assert not stale.exists()


def test_a_folder_that_cannot_be_written_is_told_and_the_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("a file where the folder would be")  # holds for root too, as permissions do not
    with serving(lambda _: http(BODY)) as host:
        made = fetcher(tmp_path, host)
        with pytest.warns(RuntimeWarning, match="cannot be written .*so what is fetched is not kept"):
            assert taken(made, item(host)) == BODY


@pytest.mark.filterwarnings("default")
def test_a_disk_that_fills_up_is_told_and_the_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lambda _: http(BODY)) as host:
        made = fetcher(tmp_path, host)
        real, full = made.cache.new, Path("/dev/full")
        if not full.exists():
            pytest.skip("needs /dev/full")

        def new() -> Any:
            draft = real()
            draft.file.close()
            draft.file = full.open("r+b", buffering=0)
            return draft

        monkeypatch.setattr(made.cache, "new", new)
        with pytest.warns(RuntimeWarning, match="No space left on device"):
            assert taken(made, item(host)) == BODY
        monkeypatch.setattr(made.cache, "nameless", new)
        with pytest.raises(ConfigError, match=r"takes what is fetched \(No space left on device\)"):
            made.open(item(host))
    assert not [p for p in (tmp_path / "kept").rglob("*") if p.is_file()]


def test_a_folder_that_can_only_be_read_still_gives_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving([http(BODY)]) as host:
        made = fetcher(tmp_path, host)
        taken(made, item(host))

        def refused(*args: Any, **kwargs: Any) -> None:
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr(os, "utime", refused)
        monkeypatch.setattr(os, "unlink", refused)
        monkeypatch.setattr("tempfile.mkstemp", refused)
        assert taken(made, item(host)) == BODY


# ---------------------------------------------------------------- stores


class _Store:
    """A store in memory; fsspec makes one for each scheme it is registered for."""

    files: dict[str, bytes | Exception] = {}
    options: list[dict[str, Any]] = []


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    fsspec = pytest.importorskip("fsspec")

    class Store(fsspec.AbstractFileSystem):  # type: ignore[misc]
        cachable = False

        def __init__(self, **options: Any) -> None:
            super().__init__()
            _Store.options.append(options)

        def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
            if path not in _Store.files:
                raise FileNotFoundError("s3 secret detail")
            found = _Store.files[path]
            if isinstance(found, Exception):
                raise found
            return {"name": path, "size": None if path.endswith("unsized") else len(found)}

        def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
            found = _Store.files[path]
            assert isinstance(found, bytes)
            return io.BytesIO(found)

    fsspec.register_implementation("s3", Store, clobber=True)
    monkeypatch.setattr("avlm.data.fetching.storage.LIBRARIES", {"s3": ("fsspec", "s3")})
    monkeypatch.setattr(_Store, "files", {})
    monkeypatch.setattr(_Store, "options", [])
    return _Store.files


def test_an_object_store_is_read_through_fsspec(tmp_path: Path, store: dict[str, Any]) -> None:
    store["bucket/a%20 b.png"] = BODY
    given = settings(tmp_path, schemes=("s3",), hosts=("bucket",), options={"s3": {"anon": True}})
    made = Fetcher(given)
    wanted = MediaItem("image", url="s3://bucket/a%20 b.png")
    assert taken(made, wanted) == BODY
    store.clear()
    assert taken(made, wanted) == BODY
    assert _Store.options == [{"anon": True}]
    assert refusal(made, MediaItem("image", url="s3://bucket/none")) == (
        "s3://bucket/none: is not in its bucket. Correct its URL, or remove it from the sample"
    )
    assert "other, which is none of the hosts" in refusal(made, MediaItem("image", url="s3://other/a"))


def test_stores_are_held_to_the_same_limits(tmp_path: Path, store: dict[str, Any]) -> None:
    store |= {
        "bucket/large": BODY,
        "bucket/unsized": BODY,
        "bucket/closed": PermissionError("key AKIA"),
        "bucket/odd": RuntimeError("detail"),
    }
    waits: list[float] = []
    made = fetcher(tmp_path, schemes=("s3",), hosts=("bucket",), max_bytes=100, waits=waits)
    for name in ("large", "unsized"):
        assert "has more than 100 bytes" in refusal(made, MediaItem("image", url=f"s3://bucket/{name}"))
    assert "is not given by its bucket to who asks" in refusal(made, MediaItem("image", url="s3://bucket/closed"))
    assert not waits
    odd = refusal(made, MediaItem("image", url="s3://bucket/odd"))
    assert "is not given by its store (RuntimeError)" in odd and "detail" not in odd
    assert len(waits) == 3


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "local:///etc/passwd", "simplecache::s3://bucket/a", "s3://bucket/a::file:///etc/passwd", "memory://a",
     "filecache::file:///etc/passwd", "zip://a::s3://bucket/a", "s3://", "s3:///a", "s3://u:p@bucket/a", "s3://bucket:80/a", "dir://x"],
)  # fmt: skip
def test_no_url_reaches_another_file_system(tmp_path: Path, store: dict[str, Any], url: str) -> None:
    made = fetcher(tmp_path, schemes=("s3",), hosts=("*",))
    with pytest.raises(MediaError) as error:
        made.open(MediaItem("image", url=url))
    assert "u:p" not in str(error.value)
    assert not _Store.options


def test_a_scheme_without_its_library_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avlm.data.fetching.storage.LIBRARIES", {"gs": ("no_such_library", "gs")})
    with pytest.raises(MissingExtraError) as error:
        doors_of(DataConfig(fetch=Fetch(schemes=("gs",), hosts=("a",))), [])
    assert str(error.value) == (
        "fetching gs:// (data.fetch.schemes) needs the library no_such_library, which is not installed. Install it with: pip install 'avlm[gs]'"
    )


# ---------------------------------------------------------------- as readers use it


def png() -> tuple[bytes, np.ndarray]:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue(), pixels


def test_a_picture_is_decoded_from_a_url_where_that_is_allowed(tmp_path: Path) -> None:
    data, pixels = png()
    with serving([http(data)]) as host:
        limits = Limits(doors=Doors(fetcher=fetcher(tmp_path, host)))
        assert np.array_equal(decode_image(item(host), limits).pixels, pixels)
        reader = MediaReader(MediaSpec(vision=VisionSpec(image_size_px=28, cell_px=14)), 1, limits)
        assert reader.prepare(item(host)) is reader.prepare(item(host))  # remembered by its URL
        with pytest.raises(MediaError) as error:
            decode_image(item(host), Limits(doors=Doors(fetcher=fetcher(tmp_path, host)), max_bytes=10))
        assert str(error.value).endswith(f"has {len(data)} bytes, and at most 10 are read. Cut or compress it")


def test_nothing_is_fetched_unless_that_is_allowed() -> None:
    with pytest.raises(MediaError) as error:
        decode_image(MediaItem("image", url="https://user:secret@example.org/a.png?token=secret"))
    assert str(error.value) == (
        "https://example.org/a.png: is a URL, and nothing is fetched unless that is allowed. "
        "Download the file and give its path, or allow its host (data.fetch.hosts)"
    )


def test_what_people_sign_in_a_url_stands_in_no_message(tmp_path: Path) -> None:
    with serving([http(b"", "403 Forbidden")]) as host:
        message = refusal(fetcher(tmp_path, host), item(host, "/a.png?X-Amz-Signature=secret#secret"))
    assert message.startswith(f"http://files.test:{host.port}/a.png: is not given")
    assert "secret" not in message


def test_a_part_of_a_file_is_read_from_a_url(tmp_path: Path) -> None:
    with serving([http(BODY)]) as host:
        limits = Limits(doors=Doors(fetcher=fetcher(tmp_path, host)))
        wanted = MediaItem("image", url=item(host).url, span=(256, 4))
        with opened(wanted, limits) as file:
            assert file.read() == b"\x00\x01\x02\x03"


def test_data_urls_are_read_without_asking_anybody() -> None:
    data, pixels = png()
    coded = base64.b64encode(data).decode()
    for url in (f"data:image/png;base64,{coded}", f"DATA:;base64,{quote(coded)}", f"data:image/png,{quote(data)}"):
        assert np.array_equal(decode_image(MediaItem("image", url=url)).pixels, pixels)
    for url in ("data:image/png;base64,%%%", "data:image/png", f"data:image/png;base64,{coded}!", "data:;base64,ü"):
        with pytest.raises(MediaError) as error:
            decode_image(MediaItem("image", url=url))
        assert str(error.value).startswith("the image given as data: is a data URL whose data are not base64.")
    with pytest.raises(MediaError, match="is empty"):
        decode_image(MediaItem("image", url="data:,"))
    with pytest.raises(MediaError, match="and at most 10 are"):
        decode_image(MediaItem("image", url=f"data:;base64,{coded}"), Limits(max_bytes=10))
