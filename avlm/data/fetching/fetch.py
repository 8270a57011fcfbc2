"""Fetch media that are given by URL, where the user allows it: kept in a folder, tried again after what may pass.

    urls       what a URL is          addresses  who may be asked
    web        http and https         storage    object stores
    cache      what was fetched

Every failure is a `MediaError` about the item, in our words, with the URL's query left out: people sign URLs there.
"""

from __future__ import annotations

import hashlib
import os
import random
import ssl
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

from avlm.config.data import Fetch
from avlm.data.fetching.addresses import Resolve, admit, resolve_name
from avlm.data.fetching.cache import Cache, Draft, Facts
from avlm.data.fetching.deadline import Deadline
from avlm.data.fetching.storage import Storage, check_libraries
from avlm.data.fetching.urls import WEB, NotFetchedError, Url, parse_url
from avlm.data.fetching.web import Body, Connect, Web
from avlm.data.fetching.window import window
from avlm.errors import ConfigError, MediaError
from avlm.samples import MediaItem


class Fetcher:
    """Opens what is at a URL. Safe for several threads; it can be pickled and is then small.

    Args:
        settings: What may be fetched.
        resolve: Gives the addresses of a name.
        connect: Connects to an address.
        tls: Checks certificates; default: by the system's authorities.
        clock: Seconds that never go back.
        sleep: Waits so many seconds.

    Raises:
        MissingExtraError: A scheme is allowed whose library is not installed.
    """

    def __init__(
        self,
        settings: Fetch,
        *,
        resolve: Resolve = resolve_name,
        connect: Connect | None = None,
        tls: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        check_libraries(settings)
        self.settings = settings
        self.cache = Cache(cache_folder(settings), settings.cache_mb * 2**20)
        self._web = Web(settings, resolve, connect, tls)
        self._storage = Storage(settings)
        self._clock = clock
        self._sleep = sleep
        self._gate = threading.BoundedSemaphore(settings.at_once)
        self._process = os.getpid()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.settings,)

    def open(self, item: MediaItem) -> BinaryIO:
        """What is at an item's URL, as a file to read and to seek in.

        Raises:
            MediaError: It may not be fetched, or is not given.
            ConfigError: There is no room on the disk.
        """
        try:
            url = parse_url(item.url)
            admit(url, self.settings)
            return self._kept(url) or self._fetched(url)
        except NotFetchedError as error:
            raise MediaError(f"{item.name()}: {error.reason}") from None

    def _kept(self, url: Url) -> BinaryIO | None:
        """What the folder has, if all who gave it then may be asked now."""
        found = self.cache.find(key_of(url))
        if found is None:
            return None
        file, hops = found
        try:
            for hop in hops:
                admit(hop, self.settings)
        except NotFetchedError:
            file.close()
            return None
        return file

    def _fetched(self, url: Url) -> BinaryIO:
        """Fetch, as often as it takes and is allowed."""
        with self._turn():
            deadline = Deadline(self.settings.total_s, self._clock)
            for tries in range(self.settings.retries + 1):
                try:
                    return self._download(url, deadline)
                except NotFetchedError as error:
                    if tries == self.settings.retries or not error.passing:
                        raise
                    wait_s = self._wait(tries, error)
                    if wait_s >= deadline.left():
                        raise
                self._sleep(wait_s)
        raise AssertionError

    def _wait(self, tries: int, error: NotFetchedError) -> float:
        """Seconds until the next try: a random part of them, so that many who failed at once do not return at once."""
        if error.wait_s > self.settings.max_wait_s:
            raise NotFetchedError(
                f"is not given by its host now, which asks to wait {error.wait_s:.0f} s. "
                "Start the command again then, or raise data.fetch.max_wait_s"
            )
        own_s = min(self.settings.wait_s * 2.0**tries, self.settings.max_wait_s)
        return max(own_s * random.uniform(0.5, 1), error.wait_s)

    def _turn(self) -> threading.BoundedSemaphore:
        """One of the downloads that may be under way; a process that was forked has its own."""
        if self._process != os.getpid():
            self._gate, self._process = threading.BoundedSemaphore(self.settings.at_once), os.getpid()
        return self._gate

    def _download(self, url: Url, deadline: Deadline) -> BinaryIO:
        """One try, into the folder, or past it where it cannot be written."""
        try:
            return self._into(self.cache.new, url, deadline)
        except OSError as error:
            _warn(self.cache.folder, error)
        try:
            return self._into(self.cache.nameless, url, deadline)
        except OSError as error:
            raise ConfigError(
                f"neither data.fetch.folder ({self.cache.folder}) nor the system's folder for temporary files takes "
                f"what is fetched ({error.strerror}). Make room, or set data.fetch.folder"
            ) from None

    def _into(self, new: Callable[[], Draft], url: Url, deadline: Deadline) -> BinaryIO:
        draft = new()
        try:
            digest, size = hashlib.sha256(), 0
            with self._body(url, deadline) as body:
                for block in body.blocks:
                    digest.update(block)
                    size += len(block)
                    draft.file.write(block)
                hops = tuple(body.hops)
            if not size:
                raise NotFetchedError("is empty, so there is nothing to decode. Correct its URL")
            draft.file.flush()
            try:
                self.cache.keep(draft, Facts(key_of(url), digest.hexdigest(), size, hops))
            except OSError as error:
                _warn(self.cache.folder, error)
            return window(draft.file, 0, size)
        except BaseException:
            draft.file.close()
            raise
        finally:
            draft.drop()

    def _body(self, url: Url, deadline: Deadline) -> AbstractContextManager[Body]:
        return (self._web if url.scheme in WEB else self._storage).body(url, deadline)


def key_of(url: Url) -> str:
    """The name under which what is at a URL is kept."""
    return hashlib.sha256(url.text().encode()).hexdigest()


def cache_folder(settings: Fetch) -> Path:
    """Where what was fetched is kept."""
    if settings.folder is not None:
        return Path(settings.folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "avlm" / "media"


def _warn(folder: Path, error: OSError) -> None:
    warnings.warn(
        f"{folder}: cannot be written ({error.strerror}), so what is fetched is not kept and is fetched again each "
        "time. Make room, or set data.fetch.folder",
        RuntimeWarning,
        stacklevel=2,
    )
