"""A picture of any kind is the same picture on every way into a model: training, cache, fingerprint, panel, endpoint,
scores and figures."""

import base64
import io
import types
from datetime import datetime, timezone

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from lmm_sae_nb.benchmarks.faulty_server import serving
from lmm_sae_nb.cache.encode_images import batches_of, open_batch
from lmm_sae_nb.chat.questions import Question
from lmm_sae_nb.chat.recorded import open_chat
from lmm_sae_nb.interpret.exemplars import masked
from lmm_sae_nb.model.samples import prompts
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.score.batches import batches
from lmm_sae_nb.show.steering_panel import SteeringPanel
from lmm_sae_nb.show.thumbnails import sheet
from lmm_sae_nb.support.images import open_images

SIDE = 48
RAMP = np.linspace(0, 65535, SIDE * SIDE).astype(np.uint16).reshape(SIDE, SIDE)
COLOURS = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
HOLE = np.arange(SIDE) < SIDE // 2  # the left half is transparent


def ramp() -> tuple[bytes, np.ndarray]:
    """16-bit grey, and the same shades in 8 bits."""
    return png(Image.fromarray(RAMP)), np.floor(RAMP / 257 + 0.5).astype(np.uint8)[..., None].repeat(3, -1)


def clear() -> tuple[bytes, np.ndarray]:
    """Transparent pixels, and white ones."""
    alpha = np.broadcast_to(np.where(HOLE, 0, 255), (SIDE, SIDE)).astype(np.uint8)
    return png(Image.fromarray(np.dstack([COLOURS, alpha]))), np.where(HOLE[:, None], 255, COLOURS).astype(np.uint8)


def turned() -> tuple[bytes, np.ndarray]:
    """A photograph from a camera held upright: to be turned clockwise."""
    tag = Image.Exif()
    tag[0x0112] = 6
    return png(Image.fromarray(COLOURS), exif=tag), np.rot90(COLOURS, -1)


def clear_palette() -> tuple[bytes, np.ndarray]:
    """A palette with a transparent entry."""
    picture = Image.fromarray(HOLE.astype(np.uint8)[None].repeat(SIDE, 0), "P")
    picture.putpalette([10, 20, 30, 40, 50, 60])
    white_or_ink = np.where(HOLE[:, None], 255, [10, 20, 30]).astype(np.uint8)
    return png(picture, transparency=1), np.broadcast_to(white_or_ink, (SIDE, SIDE, 3)).copy()


def print_colours() -> tuple[bytes, np.ndarray]:
    """Ink: what is not printed is light."""
    held = io.BytesIO()
    Image.fromarray(np.dstack([COLOURS, np.zeros_like(COLOURS[..., :1])]), "CMYK").save(held, "TIFF")
    return held.getvalue(), 255 - COLOURS


def png(picture: Image.Image, **settings) -> bytes:
    held = io.BytesIO()
    picture.save(held, "PNG", **settings)
    return held.getvalue()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", [ramp, clear, turned, clear_palette, print_colours], ids=lambda kind: kind.__name__)
def test_every_way_into_a_model_shows_the_same_pixels(lmm, sae, kind, tmp_path):
    data, expected = kind()
    plain = Image.fromarray(expected)
    wanted = lmm.prompt("", plain).inputs["pixel_values"]
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(data)
    raw = Image.open(io.BytesIO(data))

    # what a model reads: training samples and the cache
    sample = {"question": "Hm", "answer": "Oh"}
    stored = Dataset.from_list([sample | {"image": {"bytes": data, "path": None}}]).cast_column(
        "image", datasets.Image()
    )
    for rows in (stored, [sample | {"image": raw}]):
        (trained,) = prompts(lmm, rows, [0], 1)
        assert torch.equal(trained.inputs["pixel_values"], wanted)
    batch = open_batch(lmm, *next(batches_of(open_images(tmp_path / "pictures"), 1)))
    assert torch.equal(batch.prompt.inputs["pixel_values"], wanted)

    # what others read: an endpoint and scorers
    with serving() as server:
        list(open_chat(f"a model@{server.url}")([Question("a?", (raw,))]))
        sent = server.requests[0].images[0].partition("base64,")[2]
    assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(sent)))) == expected).all()
    ((pictures, _),) = batches([raw], ["a"], 1)
    assert (np.asarray(pictures[0]) == expected).all()

    # what people see
    assert (np.asarray(masked(raw, np.ones((2, 2), bool))) == expected).all()
    assert (np.asarray(sheet([[raw]], SIDE))[..., :3] == expected).all()
    panel = SteeringPanel(SAEInPlace(lmm, sae, 0), types.SimpleNamespace(max=torch.zeros(24)), {})
    when = datetime(2026, 1, 1, tzinfo=timezone.utc)
    file = {"name": "a.png", "type": "image/png", "size": len(data), "content": data, "last_modified": when}
    panel.upload.value = (file,)
    assert (np.asarray(panel.image) == expected).all()
