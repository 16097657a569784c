"""Write conversations as text with a model's chat template, as in its fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

from transformers import PreTrainedModel, ProcessorMixin

Turns = Sequence[Mapping]  # {"role": ..., "content": [{"type": "text", "text": ...}, {"type": "image"}]}

# For families that were trained without a chat template.
TEMPLATES = {
    "instructblip": "{% for message in messages %}"
    "{% for part in message.content %}{% if part.type == 'text' %}"
    "{{ ' ' if message.role == 'assistant' }}{{ part.text }}"
    "{% endif %}{% endfor %}"
    "{{ eos_token if message.role == 'assistant' }}"
    "{% endfor %}",
    "paligemma": "{% for message in messages %}"
    "{% for part in message.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}"
    "{% endfor %}",
}

# Templates on the hub that write something else than their model's fine-tuning did, each with what stands in its place.
# llava-hf/llama3-llava-next-8b-hf's writes a line break too many before each text that has no image before it, and no
# end token after an image alone. Llama 3's own template, with which LLaVA-NeXT was fine-tuned, does neither.
MENDED = {
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'}}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}{# Render all text next #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\n' + content['text'] + '<|eot_id|>' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}": (
        "{% for message in messages %}"
        "{% set turn = namespace(text='', wrote=false) %}"
        "{% for part in message.content %}{% if part.type == 'image' %}"
        "{% set turn.text = turn.text + ('<image>' if turn.wrote else '<image>\n') %}"
        "{% else %}{% set turn.text = turn.text + part.text %}{% set turn.wrote = true %}{% endif %}{% endfor %}"
        "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + turn.text | trim + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    )
}


def exchange(question: str, image: object | None, answer: str | None) -> list[dict]:
    """Return a question and its answer as turns; the image, if there is one, comes before the question."""
    parts = [{"type": "image"}] if image is not None else []
    parts += [{"type": "text", "text": question}] if question or not parts else []
    turns = [{"role": "user", "content": parts}]
    return turns + [{"role": "assistant", "content": [{"type": "text", "text": answer}]}] * (answer is not None)


class ChatTemplate:
    """The chat template that a model was fine-tuned with.

    model: whose family may have none.
    processor: writes with it.
    name: of the model, for errors.

    Raises:
        ValueError: there is none.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, name: str):
        self._processor, self._name, self._image = processor, name, str(processor.image_token)
        given = processor.chat_template or processor.tokenizer.chat_template
        self.text = MENDED.get(given, given) or TEMPLATES.get(model.config.model_type)
        if self.text is None:
            raise ValueError(f"{name} has no chat template; set lmm.processor.chat_template to that of its training")

    def write(self, conversations: Sequence[Turns], *, ask: bool = False) -> list[str]:
        """Return each conversation as text, with one image token for an image.

        An image inside a turn stays where it is if the template can do so. Otherwise it comes before the turn's text.

        ask: write the generation prompt behind it.

        Raises:
            ValueError: the template refuses a conversation, or loses one of its texts or images; or a text holds the
                image token.
        """
        for turns in conversations:
            for part in (part for turn in turns for part in turn["content"]):
                if self._image in part.get("text", ""):
                    raise ValueError(
                        f"{part['text']!r} holds the image token, which the chat template writes; leave it out"
                    )
        written = [self._write(self._arranged(turns), ask) for turns in conversations]
        for turns, text in zip(conversations, written, strict=True):
            if len(turns) > 2 or turns[0]["role"] == "system":
                self._check_whole(turns, text)
        return written

    def _write(self, turns: Turns, ask: bool) -> str:
        return self._processor.apply_chat_template(turns, chat_template=self.text, add_generation_prompt=ask)

    def _arranged(self, turns: Turns) -> list[Mapping]:
        """Put images before the text in turns of several texts, unless the template keeps the order."""
        in_order = all(map(_text_last, turns)) or self._keeps_order
        return list(turns) if in_order else [_images_first(turn) for turn in turns]

    @cached_property
    def _keeps_order(self) -> bool:
        """Whether the template writes an image between two texts where it stands."""
        parts = {"type": "text", "text": "one"}, {"type": "image"}, {"type": "text", "text": "two"}
        try:
            written = self._write([{"role": "user", "content": list(parts)}], ask=False)
        except Exception:  # a template may raise anything
            return False
        places = [written.find(text) for text in ("one", self._image, "two")]
        return -1 not in places and places == sorted(places)

    def _check_whole(self, turns: Turns, written: str) -> None:
        """Raise ValueError if a text or an image of the turns is not in what was written."""
        at = 0
        for number, turn in enumerate(self._arranged(turns)):
            for part in turn["content"]:
                text = part["text"].strip() if part["type"] == "text" else self._image
                found = written.find(text, at)
                if found < 0:
                    lost = repr(text[:60]) if part["type"] == "text" else "an image"
                    raise ValueError(
                        f"the chat template of {self._name} drops {lost} of turn {number} ({turn['role']}); take the "
                        "turn out, or set lmm.processor.chat_template to one that writes it"
                    )
                at = found + len(text)


def _text_last(turn: Mapping) -> bool:
    """Whether a turn has at most one text, behind all images."""
    return all(part["type"] == "image" for part in turn["content"][:-1])


def _images_first(turn: Mapping) -> dict:
    """Return a turn with its images first, and its texts joined."""
    images = [part for part in turn["content"] if part["type"] == "image"]
    texts = [part["text"] for part in turn["content"] if part["type"] == "text"]
    return {"role": turn["role"], "content": images + [{"type": "text", "text": "".join(texts)}] * bool(texts)}
