"""Energon's sample types, as what is asked and answered in them.

Texts of a document (captions, interleaved) are answers to the media before them: so all of its text is learned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from avlm.errors import DataError
from avlm.samples import MediaItem

Values = Mapping[str, Any]


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def captioning(values: Values) -> dict[str, Any]:
    """A picture and its words."""
    return {"query": "", "response": values.get("caption"), "images": _listed(values.get("image"))}


def recognition(values: Values) -> dict[str, Any]:
    """A picture and the text that can be read in it."""
    return {"query": "", "response": values.get("text"), "images": _listed(values.get("image"))}


def classification(values: Values) -> dict[str, Any]:
    """A picture and its class, by name where it has one."""
    name = values.get("label_name")
    label = values.get("label") if name is None else name
    return {"query": "", "response": None if label is None else str(label), "images": _listed(values.get("image"))}


def words(values: Values) -> dict[str, Any]:
    """A text alone."""
    return {"query": "", "response": values.get("text")}


def answering(values: Values) -> dict[str, Any]:
    """A question about a picture or a video and its answer: of several the one that weighs most, the first of equals.

    A list of questions with as many answers is a conversation.
    """
    row: dict[str, Any] = {"images": _listed(values.get("image")), "videos": _listed(values.get("video"))}
    asked, answers = values.get("context"), values.get("answers")
    if isinstance(asked, list):
        told = _listed(answers)
        if not asked or len(asked) != len(told):
            raise DataError(f"has {len(asked)} questions and {len(told)} answers. Give each question its answer")
        pairs = list(zip(asked, told, strict=True))
        return row | {"history": pairs[:-1], "query": pairs[-1][0], "response": pairs[-1][1]}
    return row | {"query": asked, "response": _best(answers, values.get("answer_weights"))}


def _best(answers: Any, weights: Any) -> Any:
    if not isinstance(answers, (list, tuple)):
        return answers
    if not answers:
        return None
    told = [weight for weight in _listed(weights) if isinstance(weight, (int, float))]
    if len(told) != len(answers):
        return answers[0]
    return answers[max(range(len(answers)), key=lambda i: (told[i], -i))]


def interleaved(values: Values) -> dict[str, Any]:
    """Words and media in the order in which they are read."""
    return _document(_listed(values.get("sequence")))


def similar(values: Values) -> dict[str, Any]:
    """Texts, and pictures each of which stands before the text that it is most like.

    Source:
        Multimodal C4 (arXiv:2304.06939, section 3): which text that is, the row says, or its matrix of similarities.
    """
    texts = _listed(values.get("texts"))
    media = [*_listed(values.get("images")), *_listed(values.get("audio")), *_listed(values.get("video"))]
    matched = _listed(values.get("matched_text_indices"))
    if not matched:
        rows = _listed(values.get("similarity_matrix"))
        matched = [max(range(len(row)), key=lambda i: (row[i], -i)) for row in rows if _are_numbers(row)]
    if len(matched) != len(media) or not all(isinstance(i, int) and 0 <= i < len(texts) for i in matched):
        raise DataError(
            f"has {len(media)} media, {len(texts)} texts and says of {len(matched)} media which text is theirs. "
            "Give each the number of its text"
        )
    sequence: list[Any] = []
    for number, text in enumerate(texts):
        sequence += [item for item, at in zip(media, matched, strict=True) if at == number]
        sequence.append(text)
    return _document(sequence)


def _are_numbers(row: Any) -> bool:
    return isinstance(row, list) and bool(row) and all(isinstance(value, (int, float)) for value in row)


def _document(sequence: list[Any]) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for part in sequence:
        if isinstance(part, MediaItem):
            if not messages or messages[-1]["role"] == "assistant":
                messages.append({"role": "user", "content": []})
            messages[-1]["content"].append({"type": part.kind, "path": part})
        elif isinstance(part, str):
            if not messages:
                messages.append({"role": "user", "content": ""})
            if messages[-1]["role"] == "assistant":
                messages[-1]["content"] += f" {part}"
            else:
                messages.append({"role": "assistant", "content": part})
        else:
            raise DataError(f"holds {type(part).__name__} in its sequence, and only words and media have a place there")
    if not messages:
        raise DataError("is an empty sequence, so there is nothing to learn. Leave it out")
    return {"messages": messages}


TYPES: dict[str, Callable[[Values], dict[str, Any]]] = {
    "Captioning": captioning,
    "ImageClassification": classification,
    "Interleaved": interleaved,
    "OCR": recognition,
    "SimilarityInterleaved": similar,
    "Text": words,
    "VQA": answering,
    "VidQA": answering,
}
"""By the name of the type, without `Sample`."""
