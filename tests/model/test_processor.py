"""A processor loads without video support and reads images and texts like the one that was saved."""

import models
import pytest
import torch
from models import noise
from transformers.utils import is_torchvision_available

from lmm_sae_nb.chat.local import LocalChat
from lmm_sae_nb.chat.questions import Question
from lmm_sae_nb.model.processor import NoVideo, load_processor


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "smolvlm"])
def test_images_are_read_as_by_the_processor_that_was_saved(family, tmp_path):
    model, processor = models.make(family)
    model.config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = load_processor(tmp_path)
    assert type(loaded).__name__ == type(processor).__name__
    assert is_torchvision_available() or isinstance(loaded.video_processor, NoVideo)
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what ?"}]}]
    texts = [each.apply_chat_template(asked, add_generation_prompt=True) for each in (processor, loaded)]
    assert texts[0] == texts[1]
    old, new = (each(text=texts[:1], images=[[noise()]], return_tensors="pt") for each in (processor, loaded))
    assert old.keys() == new.keys()
    for name in old:
        torch.testing.assert_close(old[name], new[name])


def test_such_a_model_can_be_asked(tmp_path):
    model, processor = models.make("llava_onevision")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    chat = LocalChat.load(tmp_path, max_new_tokens=3)
    assert [number for number, reply in chat([Question("what ?", (noise(), noise(seed=1)))]) if reply.text] == [0]
