"""Load the processor of a multimodal model, also without torchvision, which only videos need."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available
from transformers.video_processing_utils import VideoProcessorMixin


class NoVideo(VideoProcessorMixin):
    """Takes the place of a processor's video part, which needs torchvision; nothing in this project shows videos."""

    model_input_names: ClassVar = []
    num_frames = fps = 1  # SmolVLM's processor reads them, also without videos

    def __init__(self):
        pass


def load_processor(name_or_path: str | Path, *, trust_remote_code: bool = False) -> ProcessorMixin:
    """Load a processor; without torchvision it reads no videos.

    name_or_path: a folder, or a name on the hub.
    trust_remote_code: run code that comes with the checkpoint.
    """
    remote = {"trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(name_or_path, **remote)
    kind = PROCESSOR_MAPPING.get(type(config), ProcessorMixin)
    if is_torchvision_available() or "video_processor" not in kind.get_attributes():
        return AutoProcessor.from_pretrained(name_or_path, **remote)

    def check(self: ProcessorMixin, name: str, part: object) -> object:
        return NoVideo if isinstance(part, NoVideo) else kind.check_argument_for_proper_class(self, name, part)

    kind_without = type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})
    parts = {
        "tokenizer": AutoTokenizer.from_pretrained(name_or_path, **remote),
        "image_processor": AutoImageProcessor.from_pretrained(name_or_path, **remote),
        "video_processor": NoVideo(),
    }
    settings, _ = kind.get_processor_dict(name_or_path)
    return kind_without.from_args_and_dict([parts[name] for name in kind.get_attributes()], settings)
