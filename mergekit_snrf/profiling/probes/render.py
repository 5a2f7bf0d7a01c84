"""A row as the text that a model reads: its own chat template, or the side's format string."""

from __future__ import annotations

from typing import Any

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.models.loading import tokenizer_of
from mergekit_snrf.profiling.probes.rows import Row
from mergekit_snrf.profiling.probes.template import IMAGE, fill_template
from mergekit_snrf.profiling.settings import SideConfig

_SENTINEL = "QUESTION"


class RenderError(Exception):
    """Why one row cannot be rendered."""


class Renderer:
    """Writes the prompts of one side, by its template or by its model's chat template.

    Attributes:
        processor: the model's processor, or its tokenizer.
        marker: the text that stands for one image in a prompt, before the processor expands it; None without images.
        adds_special_tokens: whether the tokenizer shall add its own to a prompt, such as the begin of the text. As in
            transformers: a tokenizer's chat template has written them all, a processor's may leave the begin of
            the text to the tokenizer, and a format string leaves them all.
    """

    def __init__(self, processor: Any, side: SideConfig) -> None:
        """Find the chat template and what stands for an image.

        Raises:
            SnrfError: there is neither a chat template nor a template, or nothing is known to stand for an image.
        """
        self.processor, self.side = processor, side
        self._chat_template = _chat_template(processor)
        if side.template is None and self._chat_template is None:
            raise SnrfError(
                f"{side.model}: has no chat template; set template for this side of profile.yml, a format string "
                f"over the columns such as '{{question}}'"
            )
        self.marker = _image_marker(processor, self._chat_template) if side.probes.images is not None else None
        if self.marker is None and side.probes.images is not None:
            raise SnrfError(
                f"{side.model}: neither its processor nor its chat template says what stands for an image; "
                f"image probes need a vision-language model with its processor files"
            )
        try:
            self.adds_special_tokens = self._leaves_special_tokens()
        except RenderError as error:
            raise SnrfError(f"{side.model}: {error}") from None

    def render(self, row: Row) -> str:
        """Return the prompt of a row, up to where the answer begins; every image is one ``marker``.

        Raises:
            RenderError: placeholders and images differ in number, or the chat template drops the question.
        """
        prompt = self._fill(row) if self.side.template is not None else self._chat(row)
        token = getattr(self.processor, "image_token", None)
        token = token if isinstance(token, str) and token else self.marker
        if self.marker is not None and token and prompt.count(token) != len(row.images):
            raise RenderError(f"the prompt holds {prompt.count(token)} times {token!r} for {len(row.images)} image(s)")
        return prompt

    def _leaves_special_tokens(self) -> bool:
        tokenizer = tokenizer_of(self.processor)
        if self.side.template is None and tokenizer is self.processor:
            return False
        sample = self.side.template
        if sample is None:
            sample = self._chat(Row(0, {}, _SENTINEL))
        begin = getattr(tokenizer, "bos_token", None)
        return not (begin and sample.startswith(begin))

    def _fill(self, row: Row) -> str:
        prompt = fill_template(self.side.template or "", row.fields)
        if prompt.count(IMAGE) != len(row.images):
            raise RenderError(
                f"the template has {prompt.count(IMAGE)} {IMAGE} for {len(row.images)} image(s) of the row"
            )
        return prompt.replace(IMAGE, self.marker) if self.marker is not None else prompt

    def _chat(self, row: Row) -> str:
        segments = self._segments(row)
        texts = [segment for segment in segments if segment is not None]
        parts = [{"type": "image"} if text is None else {"type": "text", "text": text} for text in segments]
        # Templates of text models take a string, those of vision-language models a list of parts; many take both.
        forms: list[Any] = [parts]
        if not row.images:
            forms.append(row.question)
        if tokenizer_of(self.processor) is self.processor:
            forms.reverse()
        for content in forms:
            prompt = apply_chat_template(self.processor, self._chat_template, content)
            if all(text.strip() in prompt for text in texts) and repr(parts[0]) not in prompt:
                return prompt
        what = "the question or its images" if row.images else "the question"
        raise RenderError(f"the chat template leaves out {what}; set template for this side of profile.yml")

    def _segments(self, row: Row) -> list[str | None]:
        """Return the question's texts, with None where an image goes: where the question says so, else in front."""
        if not row.images:
            return [row.question]
        texts = row.question.split(IMAGE)
        if len(texts) == 1:
            return [*[None] * len(row.images), row.question]
        if len(texts) - 1 != len(row.images):
            raise RenderError(f"the question has {len(texts) - 1} {IMAGE} for {len(row.images)} image(s) of the row")
        segments: list[str | None] = []
        for index, text in enumerate(texts):
            segments += [None] if index else []
            segments += [text] if text.strip() else []
        return segments


def apply_chat_template(processor: Any, chat_template: str | None, content: Any) -> str:
    """Return one user message as the chat template writes it, up to where the answer begins.

    Raises:
        RenderError: the template refuses the message.
    """
    from jinja2 import TemplateError

    try:
        return processor.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=chat_template,
            add_generation_prompt=True,
            tokenize=False,
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise RenderError(f"the chat template fails ({error})") from None


def _chat_template(processor: Any) -> str | None:
    for owner in (processor, tokenizer_of(processor)):
        template = getattr(owner, "chat_template", None)
        if isinstance(template, dict):
            template = template.get("default")
        if template:
            return template
    return None


def _image_marker(processor: Any, chat_template: str | None) -> str | None:
    """Return what a chat template writes for an image, such as the token with the marks around it."""
    if chat_template is not None and tokenizer_of(processor) is not processor:
        text = {"type": "text", "text": _SENTINEL}
        try:
            without = apply_chat_template(processor, chat_template, [text])
            with_image = apply_chat_template(processor, chat_template, [{"type": "image"}, text])
        except RenderError:
            without = with_image = ""
        start = next((i for i, (a, b) in enumerate(zip(without, with_image, strict=False)) if a != b), len(without))
        marker = with_image[start : len(with_image) - len(without) + start].strip()
        if marker and without[start:] and with_image.endswith(without[start:]):
            return marker
    token = getattr(processor, "image_token", None)
    return token if isinstance(token, str) and token else None
