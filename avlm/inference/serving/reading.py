"""Processes that read requests: JSON, forms, addresses, media, tokens. What hangs or crashes there costs one request.

The process that holds the model parses nothing that a stranger wrote. It hands bytes over and gets tokens and tensors
back, or a refusal, or nothing: then the worker is replaced and the request refused.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from avlm.config.data import Fetch
from avlm.config.serve import Serve
from avlm.data.decoding.doors import Doors
from avlm.data.decoding.files import limits_of
from avlm.data.fetching.fetch import Fetcher
from avlm.data.media.reader import MediaReader
from avlm.data.text.templates import unmarked
from avlm.data.workers.crew import Crew, Lost
from avlm.data.workers.foreman import Error
from avlm.errors import DataError, MediaError
from avlm.inference.chat import Chat
from avlm.inference.prompts import Known, Prompt, Prompts
from avlm.inference.serving.asking import Wishes, chat_request
from avlm.inference.serving.fields import parse_json
from avlm.inference.serving.hearing import transcription_request
from avlm.inference.serving.refusing import RefusedError, about_media, our_fault
from avlm.layout import AudioFacts
from avlm.samples import MediaItem, Sample, Text

log = logging.getLogger("avlm.serving")


@dataclass(frozen=True, slots=True)
class Body:
    """A request as it came."""

    kind: Literal["chat", "transcription"]
    data: bytes
    content_type: str = ""
    anew: bool = False
    """Whether all its media are wanted, also those that were read before."""


@dataclass(frozen=True, slots=True)
class Question:
    """A request as the model takes it."""

    prompt: Prompt
    wishes: Wishes
    heard_s: float = 0.0
    """Length of the recording that is to be transcribed."""


KNOWN = 4096
"""Media that a worker knows again, and does not decode then: a conversation comes whole with each of its turns."""


class Reading:
    """Reads one request; called in a worker.

    Of media that it knows again there is nothing in the prompt but their digest and their place, as their embeddings
    are remembered where the model is. Where they are not, the request is read once more, `anew`.

    Args:
        chat: The model.
        settings: Of the server.
        longest: Tokens that the language model can read; None: any number.
        check_name: Refuses to answer for another model.
        make_fetcher: Makes what fetches URLs.
    """

    def __init__(
        self,
        chat: Chat,
        settings: Serve,
        longest: int | None,
        check_name: Callable[[str | None], None],
        make_fetcher: Callable[[Fetch], Fetcher] = Fetcher,
    ) -> None:
        self.settings, self.longest, self.check_name = settings, longest, check_name
        self.limits = limits_of(settings.limits, NOWHERE)
        self.fetcher = None if settings.fetch is None else make_fetcher(settings.fetch)
        self.processor = chat.processor.with_template(chat.processor.tokens().template)
        self.processor.use_reader(MediaReader(self.processor.media_spec(), limits=self.limits))
        self._prompts = Prompts(chat.model, self.processor, KNOWN)
        self._anew = Prompts(chat.model, self.processor, 1)  # in which nothing is ever put

    def __call__(self, body: Body) -> Question | RefusedError:
        """What the request asks, or why it is refused."""
        try:
            if body.kind == "chat":
                sample, wishes = chat_request(parse_json(body.data), self.settings)
            else:
                sample, wishes = transcription_request(body.data, body.content_type, self.settings)
            self.check_name(wishes.model)
            return self._encoded(self._unmarked(self._fetched(sample)), wishes, body.anew)
        except RefusedError as refused:
            return refused
        except DataError as error:
            return about_media(error)

    def _unmarked(self, sample: Sample) -> Sample:
        """Answers that come back as they were given, as a conversation remembers them."""
        turns = tuple(
            turn if turn.role != "assistant" else replace(turn, parts=tuple(map(self._told_again, turn.parts)))
            for turn in sample.turns
        )
        return replace(sample, turns=turns)

    def _told_again(self, part: Text | MediaItem) -> Text | MediaItem:
        return Text(unmarked(part.text, self.processor.tokenizer)) if isinstance(part, Text) else part

    def _fetched(self, sample: Sample) -> Sample:
        """A conversation with the bytes of its media."""
        turns = [replace(turn, parts=tuple(map(self._with_bytes, turn.parts))) for turn in sample.turns]
        return replace(sample, turns=tuple(turns))

    def _with_bytes(self, part: Text | MediaItem) -> Text | MediaItem:
        if isinstance(part, Text) or not part.url:
            return part
        if self.fetcher is None:
            raise _not_fetched(part, "nothing is fetched here. Send the file as a data URL")
        try:
            with self.fetcher.open(part) as file:
                data = file.read(self.limits.max_bytes + 1)
        except MediaError as error:  # which says more about our network than is a stranger's business
            log.info("%s", error)
            raise _not_fetched(
                part, "its URL is not one that may be fetched here, or it did not come. Send the file as a data URL"
            ) from None
        return replace(part, url="", data=data)

    def _encoded(self, sample: Sample, wishes: Wishes, anew: bool) -> Question:
        prompt = (self._anew if anew else self._prompts).of_sample(sample)
        for medium in prompt.media:
            self._prompts.known.put(medium.digest, Known(medium.facts, {}), 1)
        if self.longest is not None and len(prompt) >= self.longest:
            raise RefusedError(
                400,
                f"This conversation has {len(prompt)} tokens, media included, and the model was made for "
                f"{self.longest}, the answer among them. Send fewer turns, fewer or shorter media",
                param="messages",
                code="context_length_exceeded",
            )
        audio, facts = self.processor.media_spec().audio, (medium.facts for medium in prompt.media)
        num_samples = sum(fact.num_samples for fact in facts if isinstance(fact, AudioFacts))
        return Question(prompt, wishes, num_samples / audio.sample_rate_hz if audio is not None else 0.0)


NOWHERE = Doors(roots=())
"""No file of this machine, and no URL: what is fetched is fetched before it is decoded."""


def _not_fetched(item: MediaItem, message: str) -> RefusedError:
    return RefusedError(400, f"{item.title}: {message}", param=item.title, code="invalid_media")


# ---------------------------------------------------------------- the workers


@dataclass(slots=True)
class _Job:
    body: Body
    done: Future[Question]


class Readers:
    """The workers, and the thread that hands requests to them.

    Args:
        work: What they do.
        settings: Of the server.
        lost: Told how, when a worker had to be ended or died.
    """

    def __init__(
        self,
        work: Callable[[Body], Question | RefusedError],
        settings: Serve,
        lost: Callable[[str], None] = lambda how: None,
    ) -> None:
        self.settings, self._lost = settings, lost
        # Forked now, before this process has threads of its own and a socket that others can connect to.
        self._crew = Crew(work, settings.workers, limit_s=settings.read_s, memory_mb=settings.worker_mb)
        self._waiting: deque[_Job] = deque()
        self._heard, self._bell = os.pipe()
        for end in (self._heard, self._bell):
            os.set_blocking(end, False)
        self._over = False
        self._thread = threading.Thread(target=self._hand_over, name="avlm-readers", daemon=True)
        self._thread.start()

    async def read(self, body: Body) -> Question:
        """What a request asks. Whoever stops waiting for it is no longer read, unless a worker has begun.

        Raises:
            RefusedError: It cannot be answered.
        """
        if self._over:
            raise our_fault()
        job = _Job(body, Future())
        self._waiting.append(job)
        self._ring()
        return await asyncio.wrap_future(job.done)

    @property
    def well(self) -> bool:
        """Whether requests can be read."""
        return not self._over

    def close(self) -> None:
        """End the workers, whatever they are at."""
        self._over = True
        self._ring()
        self._thread.join()
        os.close(self._heard)
        os.close(self._bell)

    def _ring(self) -> None:
        with suppress(BlockingIOError):  # it rings already
            os.write(self._bell, b"!")

    def _hand_over(self) -> None:
        given: dict[int, _Job] = {}
        try:
            with self._crew:
                while not self._over:
                    while self._waiting and len(given) < self.settings.workers:
                        job = self._waiting.popleft()
                        if job.done.set_running_or_notify_cancel():
                            given[self._crew.give([job.body])] = job
                    self._crew.attend(self._heard)
                    self._hush()
                    for ticket in [ticket for ticket in given if self._crew.is_done(ticket)]:
                        self._settle(given.pop(ticket), self._crew.result(ticket)[0])
        except Exception:  # no worker can be started any more
            log.exception("requests cannot be read any more")
        finally:
            self._over = True
            for job in [*given.values(), *self._waiting]:
                with suppress(Exception):
                    job.done.set_exception(our_fault())

    def _hush(self) -> None:
        with suppress(BlockingIOError):  # it has not rung
            os.read(self._heard, 4096)

    def _settle(self, job: _Job, outcome: Question | RefusedError | Error | Lost) -> None:
        if isinstance(outcome, Lost):
            log.warning("a worker was lost to a request (%s %s)", outcome.how, outcome.detail)
            self._lost(outcome.how)
            job.done.set_exception(_too_much(outcome, self.settings))
        elif isinstance(outcome, Error):
            log.error("a request could not be read", exc_info=outcome.error)
            job.done.set_exception(our_fault())
        elif isinstance(outcome, RefusedError):
            job.done.set_exception(outcome)
        else:
            job.done.set_result(outcome)


def _too_much(lost: Lost, settings: Serve) -> RefusedError:
    words = {
        "time": f"took longer than {settings.read_s:g} s to read, so that was given up. Send fewer or smaller media",
        "memory": f"takes more than {settings.worker_mb} MB to read. Send fewer or smaller media",
        "crash": "ended the process that read it, twice. Send other files",
    }
    return RefusedError(400, f"The request {words[lost.how]}", code="invalid_media")
