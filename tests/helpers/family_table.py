"""The table of families by capability: `python tests/helpers/family_table.py` writes it, a test compares it.

It goes to book/families.json and, between two marks, into book/your_own_lmm.md.
"""

import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import capabilities
import families
import models
import transformers
from models import noise

from lmm_sae_nb.model.found_layouts import FoundLayout
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.upper_layers import above

CALLS = ("train", "cache", "steer", "attribute")
BOOK = Path(__file__).parents[2] / "book"
JSON, PAGE = BOOK / "families.json", BOOK / "your_own_lmm.md"
BEGIN, END = "<!-- families: written by tests/helpers/family_table.py -->\n", "<!-- end of families -->"
SIZE = (112, 84)  # of images of families whose grid follows the image
NAMES = {
    "picture_world": "LLaVA-NeXT", "llava": "LLaVA-1.5", "llava_onevision": "LLaVA-OneVision", "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL", "qwen3_5": "Qwen3.5", "glm4v": "GLM-4V", "gemma3": "Gemma 3",
    "internvl": "InternVL", "paligemma": "PaliGemma", "mistral3": "Mistral 3 (Pixtral)", "llama4": "Llama 4",
    "aya_vision": "Aya Vision", "idefics2": "Idefics2", "idefics3": "Idefics3", "smolvlm": "SmolVLM",
    "instructblip": "InstructBLIP", "mllama": "Llama 3.2 Vision", "florence2": "Florence-2",
    "blip2_t5": "BLIP-2 with T5",
}  # fmt: skip
NOTES = {
    "mistral3": "its processor asks for torchvision",
    "llama4": "its image processor asks for torchvision; tried with one that cuts the same crops",
}


def made(family: str):
    """`(model, processor)`, with few crops."""
    model, processor = families.make(family)
    if family in ("idefics3", "smolvlm"):
        processor.image_processor.size = {"longest_edge": 512}
    return model, processor


def studied(family: str) -> LMM:
    """An LMM of this family whose images all have one grid."""
    model, processor = made(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # LLaVA-1.5's processor cuts edges off
        lmm = LMM(model, processor)
    return LMM(model, processor, image_size=SIZE) if follows_image(lmm) else lmm


def follows_image(lmm: LMM) -> bool:
    return lmm.grid is None and lmm.prompt("", noise(112, 84)).spans[0].grid is not None


def layout_in_words(lmm: LMM) -> str:
    layout = lmm.layout
    if not isinstance(layout, FoundLayout):
        return "registered"
    if layout.merge is not None:
        return "found: the processor gives the grid"
    if layout.rows:
        return "found: a marker ends each row"
    place = {None: "one crop", 0: "crops, the first shows all", -1: "crops, the last shows all"}[layout.base]
    return f"found: {place}"


def notes(lmm: LMM, family: str) -> list[str]:
    """What somebody has to know who uses this family."""
    found = [NOTES[family]] if family in NOTES else []
    if lmm.image_size:
        found.append("the grid follows the image: give `image_size`")
    if getattr(lmm.layout, "cut", False):
        found.append("edges of images that are not square are cut off: give `image_size`")
    if lmm.prompt("", noise(112, 84)).spans[0].grid is None:
        found.append("tokens have no place in the image: no maps")
    try:
        lmm.prompt("no image")
    except Exception:
        found.append("cannot read text without an image")
    if not above(lmm, lmm.prompt("what ?", noise(112, 84)), 0).continues(9):
        found.append("exact attribution runs whole sequences, which takes longer")
    return found


def outcome(call: Callable[[], object]) -> str:
    """Return "works", or why not."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}".split("\n")[0][:160]
    return "works"


def row_of(family: str, folder: Path) -> dict:
    """Try a family; return its row of the table."""
    lmm = studied(family)
    place = capabilities.a_place(lmm)
    return {
        "family": NAMES[family],
        "model_type": lmm.model.config.model_type,
        "layout": layout_in_words(lmm),
        "train": outcome(lambda: capabilities.train(lmm, folder)),
        "cache": outcome(lambda: capabilities.cache(place, folder)),
        "steer": outcome(lambda: capabilities.steer(place)),
        "attribute": outcome(lambda: capabilities.attribute(place)),
        "notes": notes(lmm, family),
    }


def refused_row(family: str) -> dict:
    model, (_, processor) = families.REFUSED[family](), models.make("picture_world")
    reason = outcome(lambda: LMM(model, processor, "x")).split(") ", 1)[1].split("; choose")[0]
    return {
        "family": NAMES[family], "model_type": model.config.model_type, "layout": "", "notes": [reason],
        **dict.fromkeys(CALLS, "refused"),
    }  # fmt: skip


def markdown(rows: list[dict], version: str = transformers.__version__) -> str:
    lines = [
        f"With transformers {version}, randomly initialised models of the true classes, float32, on a CPU:\n",
        "| family | layout of image tokens | train | cache, interpret | steer | attribute | note |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [{"works": "yes", "refused": "no"}.get(row[call], row[call]) for call in CALLS]
        named = f"{row['family']} (`{row['model_type']}`)"
        lines.append(f"| {' | '.join([named, row['layout'], *cells, '; '.join(row['notes'])])} |")
    return "\n".join(lines) + "\n"


def committed() -> dict:
    return json.loads(JSON.read_text())


def write() -> None:
    """Try all families and write the table."""
    rows = []
    for family in [*families.FAMILIES, *families.REFUSED]:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(refused_row(family) if family in families.REFUSED else row_of(family, Path(folder)))
        print(rows[-1], flush=True)
    JSON.write_text(json.dumps({"transformers": transformers.__version__, "families": rows}, indent=1) + "\n")
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + markdown(rows) + END + rest.split(END, 1)[1])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(write())
