"""Files in object stores, through fsspec and a library for each store.

The library finds its own way to the store, so no address is checked here: a bucket is asked when the user named it.
Chains of file systems, and those that read the own machine, cannot be written in a URL that `parse_url` takes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from avlm.config.data import Fetch
from avlm.data.fetching.addresses import Hop, admit
from avlm.data.fetching.deadline import Deadline, within
from avlm.data.fetching.urls import WEB, NotFetchedError, Url
from avlm.data.fetching.web import BLOCK, Body, check_size
from avlm.errors import MissingExtraError

LIBRARIES = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gs"), "az": ("adlfs", "az"), "hf": ("huggingface_hub", "hf")}
"""By scheme, the library that fsspec needs, and the extra that brings it."""


def check_libraries(settings: Fetch) -> None:
    """Make sure that every scheme that is allowed can be fetched.

    Raises:
        MissingExtraError: A library is not installed.
    """
    for scheme in settings.schemes:
        if scheme in LIBRARIES:
            library, extra = LIBRARIES[scheme]
            for name in ("fsspec", library):
                if importlib.util.find_spec(name) is None:
                    raise MissingExtraError(name, extra, f"fetching {scheme}:// (data.fetch.schemes)")


class Storage:
    """Fetches from object stores."""

    def __init__(self, settings: Fetch) -> None:
        self.settings = settings

    @contextmanager
    def body(self, url: Url, deadline: Deadline) -> Iterator[Body]:
        """What is at a URL.

        Raises:
            NotFetchedError: It may not be asked for, or is not given.
        """
        assert url.scheme not in WEB
        admit(url, self.settings)
        file = within(deadline, lambda: self._opened(url))
        try:
            yield Body(self._blocks(file, deadline), [Hop(url.scheme, url.host, url.port, private=False)])
        finally:
            with suppress(Exception):  # what was wanted is read
                within(deadline, file.close)

    def _opened(self, url: Url) -> Any:
        import fsspec

        options = {str(scheme): given for scheme, given in self.settings.options.items()}
        try:
            store = fsspec.filesystem(url.scheme, **options.get(url.scheme, {}))
            path = f"{url.host}{url.target}"
            size = store.info(path).get("size")
            if isinstance(size, int):
                check_size(size, self.settings)
            return store.open(path, "rb")
        except NotFetchedError:
            raise
        except Exception as error:  # each library has its own
            raise _failed(error) from None

    def _blocks(self, file: Any, deadline: Deadline) -> Iterator[memoryview]:
        count = 0
        while True:
            try:
                block = within(deadline, lambda: file.read(16 * BLOCK))
            except NotFetchedError:
                raise
            except Exception as error:
                raise _failed(error) from None
            if not block:
                return
            count += len(block)
            check_size(count, self.settings)
            yield memoryview(block)


def _failed(error: Exception) -> NotFetchedError:
    kind = type(error).__name__
    if isinstance(error, FileNotFoundError):
        return NotFetchedError("is not in its bucket. Correct its URL, or remove it from the sample")
    if isinstance(error, PermissionError):
        return NotFetchedError(
            "is not given by its bucket to who asks. Give its library the keys (environment or data.fetch.options)"
        )
    return NotFetchedError(f"is not given by its store ({kind}). Look at it with the store's own tool", passing=True)
