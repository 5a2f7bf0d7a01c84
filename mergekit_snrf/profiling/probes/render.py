"""A row as the text that a model reads: by its own chat template, or by a format string."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergekit_snrf.errors import SnrfError, first_line
from mergekit_snrf.models.loading import tokenizer_of
from mergekit_snrf.profiling.probes.rows import Row
from mergekit_snrf.profiling.probes.source import IMAGE, ProbeSource, RowError, fill_template

MAX_SECONDS = 2.0
"""CPU time that a chat template may take for one prompt."""
MAX_MEMORY = 2**30
"""Bytes that a chat template may use for one prompt."""
MAX_PROMPT = 10_000_000
"""Characters that one prompt may have."""

_SENTINEL = "QUESTION"
_MARK = re.compile(r"<image(?: (\d{1,3}))?>")
_OWN_TEMPLATE = "write a template, such as '{question}'"


class Renderer:
    """Writes prompts, by the template of the probe source or by the model's chat template.

    Attributes:
        processor: the model's processor, or its tokenizer.
        marker: the text that marks one image in a prompt, before the processor expands it; None without images.
        adds_special_tokens: whether the tokenizer adds its own to a prompt, such as the begin of the text. As in
            transformers: a tokenizer's chat template has written them all, a processor's may leave the begin of
            the text to the tokenizer, and a format string leaves them all.
    """

    def __init__(self, processor: Any, source: ProbeSource, *, model: str | None = None) -> None:
        """Find the chat template and what marks an image, and render a sample; ``SnrfError``: one of them fails."""
        self.processor, self.source = processor, source
        self.model = model or str(getattr(tokenizer_of(processor), "name_or_path", "") or "the model")
        self._chat_template = _chat_template(processor)
        if source.template is None and self._chat_template is None:
            raise SnrfError(self.model, "has no chat template", _OWN_TEMPLATE, field="template")
        self.marker = self._image_marker() if source.images is not None else None
        if self.marker is None and source.images is not None:
            what = "neither its processor nor its chat template defines what marks an image"
            raise SnrfError(self.model, what, "use a vision-language model with its processor files", field="images")
        sample = source.template or self._chat(Row(0, {}, _SENTINEL))
        tokenizer = tokenizer_of(processor)
        begin = getattr(tokenizer, "bos_token", None)
        chat_of_tokenizer = source.template is None and tokenizer is processor
        self.adds_special_tokens = not chat_of_tokenizer and not (begin and sample.startswith(begin))

    def render(self, row: Row) -> str:
        """Return the prompt of a row, up to where the answer begins; every image is one ``marker``."""
        if self.source.template is not None and len(row.turns) > 1:
            what = f"the conversation has {len(row.turns)} messages, and a template writes only one"
            raise RowError(None, what, "remove template, so that the chat template writes them", field="template")
        prompt = self._fill(row) if self.source.template is not None else self._chat(row)
        token = self._image_token() or self.marker
        if self.marker is not None and token and prompt.count(token) != len(row.images):
            what = f"the prompt has {prompt.count(token)} times {token!r} for {len(row.images)} image(s)"
            raise RowError(None, what)
        return prompt

    def _fill(self, row: Row) -> str:
        fields = {name: _MARK.sub(IMAGE, text) if row.images else text for name, text in row.fields.items()}
        prompt = fill_template(self.source.template or "", fields)
        if prompt.count(IMAGE) != len(row.images):
            what = f"the template has {prompt.count(IMAGE)} {IMAGE} for {len(row.images)} image(s) of the row"
            raise RowError(None, what, "write one for each image", field="template")
        return prompt.replace(IMAGE, self.marker) if self.marker is not None else prompt

    def _chat(self, row: Row) -> str:
        messages = _messages(row)
        if self.source.system is not None:
            messages = [("system", [self.source.system]), *(one for one in messages if one[0] != "system")]
        # Templates of reasoning models shorten earlier answers.
        asked = [content for role, content in messages if role != "assistant"]
        texts = [text for content in asked for text in content if text is not None]
        # Templates of text models take a string, those of vision-language models a list of parts; many take both.
        roles = {role for role, _ in messages}
        forms = [_form(messages, set()), *([_form(messages, {"system"})] if "system" in roles else [])]
        if not row.images:
            forms.append(_form(messages, roles))
        if tokenizer_of(self.processor) is self.processor:
            forms.reverse()
        failed: list[RowError] = []
        for form in forms:
            try:
                prompt = self._apply(form)
            except RowError as error:
                failed.append(error)
                continue
            if all(text.strip() in prompt for text in texts) and _SHOWN_PART not in prompt:
                return prompt
        if len(failed) == len(forms):
            raise failed[0]
        what = "the question or its images" if row.images else "the question"
        raise self._template_error(f"the chat template leaves out {what}")

    def _apply(self, messages: list[dict[str, Any]]) -> str:
        """Return messages as the chat template writes them, up to where the answer begins."""
        try:
            with _limited():
                prompt = self.processor.apply_chat_template(
                    messages,
                    chat_template=self._chat_template,
                    add_generation_prompt=True,
                    tokenize=False,
                    **(self.source.chat_template_kwargs or {}),
                )
        except (_TooLongError, MemoryError) as error:
            limit = (
                f"{MAX_MEMORY >> 30} GiB of memory" if isinstance(error, MemoryError) else f"{MAX_SECONDS:g} seconds"
            )
            what = f"the chat template takes more than {limit} for one prompt"
            raise SnrfError(self.model, what, _OWN_TEMPLATE, field="template") from None
        except Exception as error:  # Templates are programs, which fail in all ways.
            raise self._template_error(f"the chat template fails ({first_line(error)})") from None
        if len(prompt) > MAX_PROMPT:
            what = f"the chat template writes {len(prompt)} characters, more than {MAX_PROMPT}"
            raise SnrfError(self.model, what, _OWN_TEMPLATE, field="template")
        return prompt

    def _template_error(self, reason: str) -> RowError:
        return RowError(self.model, reason, _OWN_TEMPLATE, field="template")

    def _image_marker(self) -> str | None:
        """Return what a chat template writes for an image, such as the token with the marks around it."""
        if self._chat_template is not None and tokenizer_of(self.processor) is not self.processor:
            text = {"type": "text", "text": _SENTINEL}
            try:
                without = self._apply([{"role": "user", "content": [text]}])
                with_image = self._apply([{"role": "user", "content": [{"type": "image"}, text]}])
            except RowError:
                without = with_image = ""
            start = next((i for i, (a, b) in enumerate(zip(without, with_image, strict=False)) if a != b), len(without))
            marker = with_image[start : len(with_image) - len(without) + start].strip()
            if marker and without[start:] and with_image.endswith(without[start:]):
                return marker
        return self._image_token()

    def _image_token(self) -> str | None:
        token = getattr(self.processor, "image_token", None)
        return token if isinstance(token, str) and token else None


_SHOWN_PART = "{'type': 'text', 'text': "
"""In a prompt whose template takes strings and was given parts."""


def _form(messages: list[tuple[str, list[str | None]]], as_text: set[str]) -> list[dict[str, Any]]:
    """Return messages as templates take them: a string for some roles, a list of parts for others."""
    parts = [[{"type": "image"} if one is None else {"type": "text", "text": one} for one in c] for _, c in messages]
    return [
        {"role": role, "content": "".join(filter(None, content)) if role in as_text else several}
        for (role, content), several in zip(messages, parts, strict=True)
    ]


def _messages(row: Row) -> list[tuple[str, list[str | None]]]:
    """Return the role and the texts of every message, with None where an image goes.

    That is where the texts mark it, by ``<image>`` or numbered as ``<image 1>``; without marks in front of the first
    question.
    """
    turns = row.turns or (("user", row.question),)
    if not row.images:
        return [(role, [text]) for role, text in turns]
    marks = [mark for _, text in turns for mark in _MARK.findall(text)]
    if not marks:
        first = next(index for index, (role, _) in enumerate(turns) if role == "user")
        images: list[str | None] = [None] * len(row.images)
        return [(role, [*images, text] if index == first else [text]) for index, (role, text) in enumerate(turns)]
    if len(marks) != len(row.images):
        raise RowError(None, f"the question has {len(marks)} {IMAGE} for {len(row.images)} image(s) of the row")
    if any(mark and int(mark) != number for number, mark in enumerate(marks, 1)):
        raise RowError(None, f"the question marks its images in the order {', '.join(marks)}")
    return [(role, _split(text)) for role, text in turns]


def _split(text: str) -> list[str | None]:
    segments: list[str | None] = []
    for index, piece in enumerate(_MARK.sub(IMAGE, text).split(IMAGE)):
        segments += [None] if index else []
        segments += [piece] if piece.strip() else []
    return segments


def _chat_template(processor: Any) -> str | None:
    found = (getattr(owner, "chat_template", None) for owner in (processor, tokenizer_of(processor)))
    templates = (one.get("default") if isinstance(one, dict) else one for one in found)
    return next((template for template in templates if template), None)


class _TooLongError(BaseException):
    """A chat template did not end in time. Not an ``Exception``, which the template's library might catch."""


@contextmanager
def _limited() -> Iterator[None]:
    """Limit CPU time and memory of the block, in the main thread of a Unix process.

    Chat templates come with checkpoints and may loop for ever or fill the memory; transformers' sandbox limits neither.
    """
    if not hasattr(signal, "SIGVTALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return
    import resource

    def stop(*_: Any) -> None:
        raise _TooLongError

    before = signal.signal(signal.SIGVTALRM, stop)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    try:
        _limit_memory(limits)
        signal.setitimer(signal.ITIMER_VIRTUAL, MAX_SECONDS)
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _limit_memory(limits: tuple[int, int]) -> None:
    import resource

    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        wanted = pages * resource.getpagesize() + MAX_MEMORY
        if limits[0] == resource.RLIM_INFINITY or wanted < limits[0]:
            resource.setrlimit(resource.RLIMIT_AS, (wanted, limits[1]))
    except (OSError, ValueError, IndexError):
        pass  # No such file outside Linux.
