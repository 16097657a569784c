"""Small data sets with the columns and splits of those on the hub, as parquet files with their card."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pictures

TEXT = Value("string")
HALLUSION = [
    "category", "subcategory", "visual_input", "set_id", "figure_id", "sample_note", "question_id", "question",
    "gt_answer_details", "gt_answer", "filename",
]  # fmt: skip
COLUMNS = {
    "LLaVA-NeXT-Data": Features(
        id=TEXT, conversations=[{"from": TEXT, "value": TEXT}], data_source=TEXT, image=Image()
    ),
    "COCO-Caption2017": Features(
        question_id=TEXT, image=Image(), question=TEXT, answer=[TEXT], id=Value("int64"), file_name=TEXT
    ),
    "HallusionBench": Features({**dict.fromkeys(HALLUSION, TEXT), "image": Image()}),
    "sae-sample-cache-dataset": Features(image=Image(), source=TEXT),
}  # fmt: skip


def picture(number: int, side: int = 48) -> dict:
    """A picture's bytes: blocks of colours; some are JPEG, some wide."""
    random = np.random.default_rng(number)
    blocks = random.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    image = Pictures.fromarray(blocks).resize((side + 16 * (number % 3), side), Pictures.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG" if number % 2 else "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{number}.png"}


def llava(rows: int) -> list[dict]:
    """Conversations: most of two turns with an image; every tenth does not fit, every seventh has no image."""
    made = []
    for number in range(rows):
        has_image = number % 7 != 6
        mark = "<image>\n" if has_image else ""
        turns = [("human", f"{mark}What is number {number}?"), ("gpt", f"It is a thing of kind {number % 5}.")]
        if number % 3:
            turns += [("human", "Is it big?"), ("gpt", "Yes" if number % 2 else "No")]
        if number % 10 == 9:
            turns = turns[:1]
        said = [{"from": who, "value": text} for who, text in turns]
        image = picture(number) if has_image else None
        made.append({"id": str(number), "conversations": said, "data_source": "made", "image": image})
    return made


def coco(rows: int) -> list[dict]:
    return [
        {"question_id": str(n), "image": picture(1000 + n), "question": "Describe it.", "answer": ["a", "b"], "id": n,
         "file_name": f"{n}.jpg"}
        for n in range(rows)
    ]  # fmt: skip


def sampled(rows: int) -> list[dict]:
    return [{"image": picture(3000 + n), "source": "made"} for n in range(rows)]


def hallusion(rows: int) -> list[dict]:
    kinds = ("chart", "map", "illusion")
    return [
        dict.fromkeys(COLUMNS["HallusionBench"], "")
        | {"subcategory": kinds[n % 3], "visual_input": "1", "question": f"Is bar {n} the highest?",
           "gt_answer": str(n % 2), "image": picture(2000 + n)}
        for n in range(rows)
    ]  # fmt: skip


def publish(hub: Path, name: str, splits: dict[str, Sequence[dict]], files: int = 1) -> None:
    """Write a data set of lmms-lab as it is on the hub: parquet files, and a card with sizes and splits."""
    features, folder = COLUMNS[name], hub / "datasets/lmms-lab" / name
    (folder / "data").mkdir(parents=True)
    described, written = [], 0
    for split, rows in splits.items():
        whole = Dataset.from_list(list(rows), features=features)
        for number in range(files):
            part = folder / f"data/{split}-{number:05d}-of-{files:05d}.parquet"
            whole.shard(files, number, contiguous=True).to_parquet(part, batch_size=10)
            written += part.stat().st_size
        described.append({"name": split, "num_bytes": whole.data.nbytes, "num_examples": len(whole)})
    info = {
        "features": features._to_yaml_list(), "splits": described, "download_size": written,
        "dataset_size": sum(split["num_bytes"] for split in described),
    }  # fmt: skip
    paths = [{"split": split, "path": f"data/{split}-*"} for split in splits]
    card = {"dataset_info": info, "configs": [{"config_name": "default", "data_files": paths}]}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card, sort_keys=False)}---\n")
