"""Small pictures of what excites a latent, for the widgets and for the pages of the book."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from jaxtyping import Float, Integer
from PIL import Image

from lmm_sae_nb.show.markup import escaped
from lmm_sae_nb.support.images import rgb

GAP = 2  # pixels between the pictures of a sheet


def heated(image: Image.Image, activation: Float[np.ndarray, "rows cols"], strength: float = 0.65) -> Image.Image:
    """Return the image in grey, with its patches coloured by activation from black to yellow.

    Patches that are not active stay grey. The size is that of the image.

    activation: of each patch; the highest one is yellow.
    strength: weight of the colour, from 0 to 1.
    """
    image = rgb(image)
    grey = np.asarray(Image.merge("RGB", 3 * [image.convert("L")]), np.float32)
    highest = max(float(activation.max()), 1e-9)
    colours = matplotlib.colormaps["inferno"](np.clip(activation / highest, 0, 1))[..., :3] * 255
    patches = np.concatenate([colours, 255.0 * (activation[..., None] > 0)], -1).astype(np.uint8)
    over = np.asarray(Image.fromarray(patches, "RGBA").resize(image.size, Image.Resampling.NEAREST), np.float32)
    weight = strength * over[..., 3:] / 255
    return Image.fromarray((grey * (1 - weight) + over[..., :3] * weight).astype(np.uint8))


def sheet(rows: Sequence[Sequence[Image.Image]], side: int) -> Image.Image:
    """Put rows of pictures on one transparent sheet.

    side: pixels of the square that each picture fits into.

    Raises:
        ValueError: there is no picture.
    """
    columns = max((len(row) for row in rows), default=0)
    if not columns:
        raise ValueError("there is no picture to show; leave out latents that are never active")
    step = side + GAP
    whole = Image.new("RGBA", (columns * step - GAP, len(rows) * step - GAP))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            small = rgb(picture).copy()
            small.thumbnail((side, side), Image.Resampling.LANCZOS)
            whole.paste(small, (x * step, y * step))
    return whole


def webp(image: Image.Image, quality: int = 80) -> bytes:
    """Return the image in the WebP format."""
    data = io.BytesIO()
    image.save(data, "webp", quality=quality, method=2)  # method 3 takes twice as long and saves 4% of the bytes
    return data.getvalue()


def histogram_svg(
    counts: Integer[np.ndarray, " bins"], edges: Float[np.ndarray, " ends"], label: str, width: int = 240
) -> str:
    """Return a histogram as an SVG element: a bar for each bin, the range, and a label, which is escaped.

    width: pixels.
    """
    height, base = 64, 46
    bar, highest = width / max(1, len(counts)), max(1, int(counts.max(initial=0)))
    bars = "".join(
        f"M{n * bar:.1f} {base}v-{base * count / highest:.1f}h{bar * 0.9:.1f}V{base}z"
        for n, count in enumerate(counts.tolist())
        if count
    )
    ends = (("start", 0, edges[0]), ("end", width, edges[-1])) if len(counts) else ()
    texts = "".join(f'<text x="{x}" y="{base + 8}" text-anchor="{anchor}">{end:.3g}</text>' for anchor, x, end in ends)
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" fill="currentColor" font-size="8" '
        f'role="img" aria-label="{escaped(label)}"><path d="{bars}"/>{texts}'
        f'<text x="{width / 2}" y="{height - 1}" text-anchor="middle">{escaped(label)}</text></svg>'
    )
