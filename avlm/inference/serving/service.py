"""One model that is served: its workers, its running batch, its places, and what was counted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path

from avlm.config.data import Fetch
from avlm.config.serve import Serve
from avlm.data.fetching.fetch import Fetcher
from avlm.inference.chat import Chat, load
from avlm.inference.engine import Engine
from avlm.inference.prompts import Prompt
from avlm.inference.serving.answering import Usage
from avlm.inference.serving.counting import Counts
from avlm.inference.serving.places import Places
from avlm.inference.serving.reading import Body, Question, Readers, Reading
from avlm.inference.serving.refusing import RefusedError
from avlm.inference.serving.running import Running, Update, Updates
from avlm.models.memory import give_memory_back

ALIAS = "avlm"
"""A name that every model goes by."""
TIDY_S = 30.0
"""How often memory that is free is given back."""


class Service:
    """A model that can be asked while `open` lasts.

    Args:
        model: A model directory, or a model that is loaded.
        settings: Of the server.
        make_fetcher: Makes what fetches URLs.
    """

    def __init__(
        self, model: Path | str | Chat, settings: Serve, make_fetcher: Callable[[Fetch], Fetcher] = Fetcher
    ) -> None:
        loaded = model if isinstance(model, Chat) else load(model, device=settings.device, quant=settings.quant)
        folder = None if isinstance(model, Chat) else Path(model)
        self.settings = settings
        self.name = settings.name or (folder.resolve().name if folder is not None else "") or ALIAS
        self.names = {self.name, ALIAS, *({str(model)} if folder is not None else ())}
        """What requests may call it; also as in the command that started it, which is known to those who use it."""
        self.created = int(time.time() if folder is None else (folder / "config.json").stat().st_mtime)
        self.counts = Counts()
        self.places = Places(settings, self._sent_away)
        longest = getattr(loaded.model.config.text_config.get_text_config(), "max_position_embeddings", None)
        self._reading = Reading(loaded, settings, longest, self.check_name, make_fetcher)
        kept_bytes = settings.kept_mb * 2**20
        self.engine = Engine(loaded.model, loaded.processor, slots=settings.slots, kept_bytes=kept_bytes)
        """Used by one thread: whatever else is done with it is done by `running.run`."""
        self.running = Running(self.engine)
        self.readers: Readers | None = None

    def _sent_away(self) -> None:
        self.counts.full += 1

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Workers and the engine's thread, for as long as the block lasts."""
        with closing(Readers(self._reading, self.settings, self._lost)) as self.readers, closing(self.running):
            self.running.start()
            tidying = asyncio.create_task(self._tidy())
            try:
                yield
            finally:
                tidying.cancel()

    async def _tidy(self) -> None:
        """Now and then, between two tokens, give memory back, if anything was answered since."""
        answered = 0
        while True:
            await asyncio.sleep(TIDY_S)
            before, answered = answered, self.counts.tokens.total()
            if answered != before:
                await self.running.run(give_memory_back)

    def _lost(self, how: str) -> None:
        self.counts.lost[how] += 1

    def check_name(self, asked: str | None) -> None:
        """Refuse to answer for another model.

        Raises:
            RefusedError: It is another one.
        """
        if asked is not None and asked not in self.names:
            raise RefusedError(
                404,
                f"The model {asked[:100]!r} is not served here. Ask for {self.name!r}",
                param="model",
                code="model_not_found",
            )

    def well(self) -> bool:
        """Whether requests can be expected to be answered."""
        return self.running.well and self.readers is not None and self.readers.well

    async def read(self, body: Body) -> Question:
        """What a request asks, with the tensors or the embeddings of all its media.

        Raises:
            RefusedError: It cannot be answered.
        """
        assert self.readers is not None, "the service is open while it is asked"
        question = await self.readers.read(body)
        if not self._fill(question.prompt):
            question = await self.readers.read(replace(body, anew=True))
        return question

    def _fill(self, prompt: Prompt) -> bool:
        """Embeddings of the media that a worker knew again; false where one is not remembered any more."""
        for medium in prompt.media:
            if medium.fresh is None:
                known = self.engine.prompts.known.get(medium.digest)
                if known is None:
                    return False
                medium.embeddings = known.embeddings
        return True

    async def answers(self, question: Question, usage: Usage) -> AsyncGenerator[tuple[int, Update], None]:
        """What becomes of a question, piece by piece: which of its answers, and what came.

        Args:
            usage: Filled in on the way.

        Raises:
            RefusedError: The model failed.
        """
        begun = time.monotonic()
        updates: Updates = asyncio.Queue()
        wishes = question.wishes
        usage.prompt, usage.media = len(question.prompt), question.prompt.media_tokens
        asked = [
            self.running.ask(question.prompt, wishes.of_choice(number), updates, number)
            for number in range(wishes.choices)
        ]
        left, first_s = len(asked), 0.0
        try:
            while left:
                number, update = await updates.get()
                if update.failure is not None:
                    raise update.failure
                if not first_s:
                    first_s = time.monotonic()
                    self.counts.first_s.add(first_s - begun)
                    usage.kept = asked[number].kept_tokens
                if update.finish is not None:
                    left -= 1
                    usage.answer += asked[number].answer_tokens
                    self.places.took(time.monotonic() - first_s)
                yield number, update
        finally:
            for answer in asked:
                self.running.leave(answer)
            self._count(usage)

    def _count(self, usage: Usage) -> None:
        self.counts.tokens.update({"prompt": usage.prompt, "kept": usage.kept, "answer": usage.answer, **usage.media})
