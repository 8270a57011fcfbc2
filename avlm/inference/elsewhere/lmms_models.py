"""avlm's models for lmms-eval: one class for its tasks that have a text and media, one for those that have messages.

    lmms-eval --model avlm --model_args pretrained=runs/demo/model --tasks ...

Imported by lmms-eval alone. What it calls log likelihood is the mean loss of the answer's
tokens: of several choices it takes the one with the smallest (`multiple_choice` in its
`api/task.py`), and its own models return losses.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from lmms_eval.api.model import lmms

from avlm.errors import ConfigError
from avlm.inference.elsewhere.asking import Asker, conversation, question, sampling_of
from avlm.samples import Sample


class _Avlm(lmms):
    """What both share.

    Args:
        pretrained: A model directory.
        device: Where it runs.
        batch_size: How many answers there are at once.
    """

    def __init__(self, pretrained: str, device: str = "cpu", batch_size: int | str = 8, **kwargs: Any) -> None:
        super().__init__()
        unknown = sorted(key for key, value in kwargs.items() if key != "max_batch_size" and value is not None)
        if unknown:
            raise ConfigError(f"model_args has {unknown[0]}, and avlm takes pretrained, device, batch_size. Remove it")
        slots = int(batch_size) if str(batch_size).isdigit() else 8
        self.asker = Asker(pretrained, device=device or "cpu", slots=max(1, slots))
        self.batch_size = slots

    def _document(self, task: str, split: str, number: Any) -> Any:
        return self.task_dict[task][split][number]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Mean loss of each answer, and whether it is what the model would say. See the module."""
        found = []
        for request in requests:
            if len(request.args) == 2:  # unconditional
                sample, answer = question(request.args[0], ()), request.args[1]
            else:
                context, target, to_media, number, task, split = request.args
                document = self._document(task, split, number)
                answer = target if isinstance(target, str) else target(document)
                sample = question(context, to_media(document) or ())
            found.append(self.asker.loss(sample, answer))
        return found

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers, in the order of the requests."""
        samples, settings = zip(*(self._asked(request.args) for request in requests), strict=True)
        return self.asker.answers(samples, [sampling_of(given) for given in settings])

    @abstractmethod
    def _asked(self, args: tuple[Any, ...]) -> tuple[Sample, dict[str, Any]]:
        """What a request asks, and how it wants to be answered."""

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not there.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError("tasks of several rounds are not something that avlm does in lmms-eval. Choose others")


class AvlmSimple(_Avlm):
    """For tasks with a text and media."""

    is_simple = True

    def _asked(self, args: tuple[Any, ...]) -> tuple[Sample, dict[str, Any]]:
        context, settings, to_media, number, task, split = args
        return question(context, to_media(self._document(task, split, number)) or ()), settings


class AvlmChat(_Avlm):
    """For tasks with messages."""

    is_simple = False

    def _asked(self, args: tuple[Any, ...]) -> tuple[Sample, dict[str, Any]]:
        _, to_messages, settings, number, task, split = args
        return conversation(to_messages(self._document(task, split, number))), settings
