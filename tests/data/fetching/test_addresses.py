# ruff: noqa: E501 (whole messages are compared)
"""URLs, hosts and addresses: what is read, what is refused, and that nothing else is ever connected to."""

from __future__ import annotations

import ipaddress
import socket
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import example, given
from hypothesis import settings as tries
from hypothesis import strategies as st
from pydantic import ValidationError

from avlm.config.data import Fetch
from avlm.config.hosts import canonical_host, host_matches, pattern_of
from avlm.data.fetching.addresses import is_public, resolve_name
from avlm.data.fetching.fetch import Fetcher, key_of
from avlm.data.fetching.urls import NotFetchedError, Url, next_url, parse_url
from avlm.errors import MediaError
from avlm.samples import MediaItem, shown_url

# ---------------------------------------------------------------- URLs


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("https://example.org/a.png", Url("https", "example.org", 443, "/a.png")),
        ("HTTP://EXAMPLE.org", Url("http", "example.org", 80, "/")),
        ("https://example.org?x=1", Url("https", "example.org", 443, "/?x=1")),
        ("https://example.org:8443/a?b=http://c@d/#e", Url("https", "example.org", 8443, "/a?b=http://c@d/")),
        ("http://8.8.8.8/", Url("http", "8.8.8.8", 80, "/")),
        ("http://[2606:4700:0000::1111]:80/x", Url("http", "2606:4700::1111", 80, "/x")),
        ("https://xn--bcher-kva.example/bücher 1.png", Url("https", "xn--bcher-kva.example", 443, "/b%C3%BCcher%201.png")),
        ("https://example.org/%2e%2E/a%zz", Url("https", "example.org", 443, "/%2e%2E/a%zz")),
        ("s3://My.Bucket_1/a b/../c?versionId=3", Url("s3", "My.Bucket_1", 0, "/a b/../c?versionId=3")),
    ],
)  # fmt: skip
def test_urls_are_read(text: str, url: Url) -> None:
    assert parse_url(text) == url
    assert parse_url(url.text()) == url


@pytest.mark.parametrize(
    "text",
    [
        "", "a.png", "/etc/passwd", "//example.org/a", "https:/example.org", "https:example.org", "https://", "https:///a",
        "https://user@example.org/", "https://user:secret@example.org/", "https://example.org@127.0.0.1/", "https://@example.org/",
        "https://example.org\\@127.0.0.1/", "https://127.0.0.1\\.example.org/", "https:\\\\example.org/", "https://example.org/\\a",
        "https://exa\tmple.org/", "https://exa\nmple.org/", "https://example.org/\r\nX: y", " https://example.org/", "https://example.org /",
        "https://example。org/", "https://１２７.0.0.1/", "https://bücher.example/", "https://ex%61mple.org/", "https://127.0.0.1%2f@example.org/",
        "https://2130706433/", "https://0x7f000001/", "https://0177.0.0.1/", "https://127.1/", "https://0x7f.0.0.1/", "https://127.0.0.1./",
        "https://1.2.3.4.5/", "https://256.1.1.1/", "https://0x/", "https://example.0x1/", "https://example.1/",
        "https://example.org./", "https://.example.org/", "https://example..org/", "https://-a.example/", "https://a-.example/",
        "https://[::1%25eth0]/", "https://[fe80::1%eth0]/", "https://[::1/", "https://::1/", "https://[127.0.0.1]/", "https://[v1.a]/", "https://[]/",
        "https://example.org:/", "https://example.org:0/", "https://example.org:65536/", "https://example.org:99999999/", "https://example.org:8o/", "https://example.org:80:80/",
        "https://example.org:+80/", "https://example.org:８０/", "https://" + "a" * 64 + ".org/", "https://" + "a." * 127 + "org/", "https://example.org/\ud800",
        "file:///etc/passwd", "ftp://example.org/a", "gopher://example.org/", "javascript:alert(1)", "data:,a", "jar:http://example.org!/",
        "s3://bucket/a::file:///x", "s3://bu cket/a", "s3://[::1]/a", "s3://a@b/c", "s3:///a", "s3://..", "hf://",
    ],
)  # fmt: skip
def test_what_could_be_read_in_two_ways_is_refused(text: str) -> None:
    with pytest.raises(NotFetchedError) as error:
        parse_url(text)
    assert ". " in error.value.reason
    assert "secret" not in error.value.reason


@given(st.text("https:/@[]\\?#.%0x1279afé。:-_ \t\n", max_size=40))
@example("http://0\\@1.2.3.4")
def test_whatever_is_read_another_library_reads_alike(tail: str) -> None:
    """The classic hole: the check and the connection read a URL in two ways. Python's own parser stands for the second."""
    try:
        url = parse_url(f"http://{tail}")
    except NotFetchedError:
        return
    other = urlsplit(f"http://{tail}")
    assert (other.hostname, other.port or 80, other.username) == (url.host, url.port, None)
    again = urlsplit(url.text())
    assert (again.hostname, again.port or 80) == (url.host, url.port)
    assert parse_url(url.text()) == url
    assert url.target.isascii() and url.target.isprintable() and " " not in url.target


def test_urls_that_differ_have_different_names_in_the_folder() -> None:
    texts = [
        "http://a.b/",
        "https://a.b/",
        "https://a.b:8443/",
        "https://a.b:80/",
        "https://a.b/?",
        "https://a.b/%41",
        "https://a.b/A",
        "s3://a.b/",
        "https://a.b/x?y",
        "https://a.b/x%3Fy",
    ]
    assert len({key_of(parse_url(text)) for text in texts}) == len(texts)
    assert key_of(parse_url("https://A.b:443#x")) == key_of(parse_url("https://a.b/"))


@pytest.mark.parametrize(
    ("location", "leads_to"),
    [
        ("/x?y", "https://example.org/x?y"),
        ("x", "https://example.org/a/x"),
        ("../x", "https://example.org/x"),
        ("?y", "https://example.org/a/b?y"),
        ("//other.example/x", "https://other.example/x"),
        ("http://other.example", "http://other.example/"),
        ("/b\u00c3\u00bccher", "https://example.org/b%C3%BCcher"),  # UTF-8, as Python reads a header
        ("/b\u00fccher", "https://example.org/b%C3%BCcher"),  # Latin-1
    ],
)
def test_redirects_are_relative_to_what_was_asked(location: str, leads_to: str) -> None:
    assert next_url(parse_url("https://example.org/a/b?c"), location).text() == leads_to


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://example.org/a?token=secret", "https://example.org/a"),
        ("https://example.org/a#secret", "https://example.org/a"),
        ("https://me:secret@example.org/a", "https://example.org/a"),
        ("https://me:secret@x@example.org", "https://example.org"),
        ("https:\\\\me:secret@example.org\\a", "https:\\\\example.org\\a"),
        ("http://a\x1b[31m\n\u202e/", "http://a\\x1b[31m\\n\\u202e/"),
        ("https://e.org/" + "a" * 500, "https://e.org/" + "a" * 186),
        ("data:image/png;base64,AAAA", ""),
    ],
)
def test_urls_are_shown_without_secrets(url: str, shown: str) -> None:
    assert shown_url(url) == shown
    assert MediaItem("image", url=url).name() == (shown or "the image given as data")


# ---------------------------------------------------------------- hosts


@pytest.mark.parametrize(
    ("pattern", "fits", "does_not"),
    [
        ("example.org", ["example.org"], ["www.example.org", "example.org.evil.net", "badexample.org", "org"]),
        ("*.Example.org", ["www.example.org", "a.b.example.org"], ["example.org", "badexample.org", "www.example.org.evil.net"]),
        ("*", ["example.org", "8.8.8.8", "::1"], []),
        ("8.8.8.8", ["8.8.8.8"], ["8.8.8.80", "18.8.8.8"]),
        ("2001:DB8::1", ["2001:db8::1"], ["2001:db8::11"]),
        ("[2001:db8:0::1]", ["2001:db8::1"], ["::1"]),
    ],
)  # fmt: skip
def test_hosts_are_allowed_by_whole_labels(pattern: str, fits: list[str], does_not: list[str]) -> None:
    allowed = Fetch(hosts=(pattern,)).hosts
    assert [host for host in fits + does_not if host_matches(host, allowed)] == fits


def test_nothing_is_allowed_by_an_empty_list() -> None:
    assert not host_matches("example.org", Fetch().hosts)


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "*.",
        "*.*",
        "a.*",
        "*example.org",
        "https://example.org",
        "example.org/",
        "example.org:80",
        "*.1.2.3.4",
        "exa mple.org",
        "bücher.example",
        ".example.org",
        "**",
    ],
)
def test_patterns_that_would_not_do_what_they_say_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"is no pattern for hosts\. Write a name"):
        pattern_of(pattern)
    with pytest.raises(ValidationError, match="is no pattern for hosts"):
        Fetch(hosts=(pattern,))


def test_the_own_network_is_opened_by_names_only() -> None:
    with pytest.raises(ValidationError, match=r"'\*' would open the whole own network"):
        Fetch(private_hosts=("*",))
    with pytest.raises(ValidationError, match="has a number that is no port"):
        Fetch(ports=(0,))


@given(st.text("abcxyz0123456789-._[]:%é", max_size=30))
def test_a_host_is_written_in_one_way(text: str) -> None:
    try:
        host = canonical_host(text)
    except ValueError:
        return
    assert canonical_host(f"[{host}]" if ":" in host else host) == host


# ---------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    "address",
    ["0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.255", "168.63.129.16", "169.254.169.254",
     "172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1", "198.51.100.1", "203.0.113.1",
     "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255",
     "::", "::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "::ffff:0:127.0.0.1", "64:ff9b::127.0.0.1", "64:ff9b::a00:1", "64:ff9b:1::1", "100::1",
     "2001::1", "2001:0:7f00:1::", "2001:10::1", "2001:20::1", "2001:db8::1", "2002:7f00:1::", "2002:a00:1::1", "2002:808:808::1", "3fff::1", "fc00::1", "fd00:ec2::254", "fe80::1",
     "fe80::1%eth0", "2606:4700::1%1", "fe80::5efe:7f00:1", "fec0::1", "ff02::1", "ff0e::1", "5f00::1", "4000::1"],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        "1.1.1.1",
        "8.8.8.8",
        "93.184.216.34",
        "100.63.255.255",
        "100.128.0.0",
        "172.15.0.1",
        "172.32.0.1",
        "192.0.1.1",
        "223.255.255.255",
        "2606:4700::1111",
        "2a00:1450::1",
        "2003::1",
        "64:ff9b::8.8.8.8",
    ],
)
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@given(st.ip_addresses() | st.ip_addresses(v=4, network="0.0.0.0/0") | st.ip_addresses(v=6, network="2000::/3") | st.ip_addresses(v=6, network="2001::/16"))  # fmt: skip
def test_no_address_is_public_that_the_standard_library_calls_otherwise(address: Any) -> None:
    if is_public(address) and address not in ipaddress.ip_network("64:ff9b::/96"):
        assert address.is_global and not address.is_multicast
        assert not (
            address.is_private
            or address.is_loopback
            or address.is_link_local
            or address.is_reserved
            or address.is_unspecified
        )


@given(st.ip_addresses(v=4))
def test_addresses_in_addresses_are_judged_by_what_they_hold(inner: ipaddress.IPv4Address) -> None:
    number = int(inner)
    assert is_public(ipaddress.IPv6Address((0x64FF9B << 96) | number)) == is_public(inner)
    for outer in ((0xFFFF << 32) | number, number, (0x2002 << 112) | (number << 80), (0xFFFF << 48) | number):
        assert not is_public(ipaddress.IPv6Address(outer))


def test_the_system_resolves_names_and_says_when_it_cannot() -> None:
    assert set(resolve_name("localhost", 80)) <= {"127.0.0.1", "::1"}
    with pytest.raises(NotFetchedError, match="whose address is not found"):
        resolve_name("no-such-name.invalid", 80)


# ---------------------------------------------------------------- whatever is asked for

ADDRESSES = st.sampled_from(
    ["127.0.0.1", "10.0.0.7", "169.254.169.254", "8.8.8.8", "93.184.216.34", "::1", "fe80::1%lo", "::ffff:10.0.0.1", "2606:4700::1", "nonsense", "0.0.0.0"]
)  # fmt: skip
HOSTS = st.sampled_from(
    ["good.example", "www.good.example", "evil.example", "good.example.evil.example", "127.0.0.1", "8.8.8.8", "localhost", "0x7f.1", "2130706433", "[::1]",
     "[::ffff:127.0.0.1]", "[2606:4700::1]", "good.example.", "GOOD.example", "good.example@evil.example", "good.example\\@evil.example", "good.example%00", "intern.example",
     "ⓖood.example", "good。example", ""]
) | st.text("good.exampl127[]:@%\\", max_size=20)  # fmt: skip
URLS = st.builds(
    "{}{}{}{}{}".format,
    st.sampled_from(["http", "https", "HTTP", "s3", "file", "ftp", "gopher", "", " http", "http\n"]),
    st.sampled_from(["://", ":/", ":\\\\", "//", ":///", "://@", "://x:y@"]),
    HOSTS,
    st.sampled_from(["", ":80", ":443", ":22", ":6379", ":", ":080", ":-1"]),
    st.sampled_from(
        ["", "/", "/a?b#c", "\\", "/\r\nHost: evil.example", "@good.example/", "?@good.example", "#@good.example"]
    ),
) | st.text(max_size=50)


@tries(max_examples=400, deadline=None)
@given(st.lists(URLS, min_size=1, max_size=4), st.lists(st.lists(ADDRESSES, max_size=3), min_size=12, max_size=12))
@example(["http://8.8.8.8/"], [[]] * 12)
@example(["http://good.example/", "http://intern.example/"], [["93.184.216.34"], ["10.0.0.7"], *[[]] * 10])
def test_whatever_is_asked_for_no_connection_goes_where_none_may(urls: list[str], answers: list[list[str]]) -> None:
    """A spy stands for the network: each answer is a redirect to the next URL, each resolution gives other addresses."""
    resolved: dict[str, list[str]] = {}
    went: list[str] = []
    queue = iter(answers)
    locations = iter(urls[1:])

    def resolve(name: str, port: int) -> list[str]:
        resolved[name] = next(queue, [])
        return resolved[name]

    def connect(address: str, port: int, timeout_s: float) -> socket.socket:
        assert port == 80
        went.append(address)
        ours, theirs = socket.socketpair()
        location = next(locations, "/end").replace("\r", "").replace("\n", "").encode("utf-8", "replace")
        theirs.sendall(b"HTTP/1.1 302 Found\r\nLocation: " + location + b"\r\n\r\n")
        theirs.close()
        return ours

    given = Fetch(schemes=("http",), hosts=("good.example", "*.good.example", "8.8.8.8", "127.0.0.1"), private_hosts=("intern.example",), retries=0, redirects=4, folder=str(Path(tempfile.gettempdir()) / "avlm-never"), cache_mb=0)  # fmt: skip
    made = Fetcher(given, resolve=resolve, connect=connect, sleep=lambda seconds: None)
    with pytest.raises(MediaError):
        made.open(MediaItem("image", url=urls[0]))
    assert all(name in ("good.example", "intern.example") or name.endswith(".good.example") for name in resolved)
    inner = set(resolved.get("intern.example", []))
    for address in went:
        found = ipaddress.ip_address(address)
        assert address in inner or (found.is_global and not found.is_multicast)
