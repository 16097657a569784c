"""The features page: every latent that the explainer was asked about, to search and sort without a server."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmm_sae_nb.show.latent_table import LatentTable

HEAD = """# Features

Every latent of the run `{run}` that the explainer was asked about. The upper row shows the images that excite it most,
the lower row where it is active in them. Names and scores come from
[notebook 03](notebooks/03_interpret_features) and [04](notebooks/04_score_interpretations). Search for a word or a
latent's number; sort by any column.
"""
NOTHING = "# Features\n\nNo latent of the run `{run}` has been explained yet.\n"
BODY = """
````{{raw}} html
<style>
.latents {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 1rem; }}
.latents article {{ content-visibility: auto; contain-intrinsic-size: 300px 165px; }}
.latents img {{ display: block; max-width: 100%; height: auto; }}
.latents td, .latents th {{ text-align: left; padding: 0 .6em 0 0; font-size: .8em; overflow-wrap: anywhere; }}
#latents-asked {{ display: flex; flex-wrap: wrap; gap: .6em; align-items: center; margin-bottom: 1em; }}
</style>
<form id="latents-asked" onsubmit="return false">
<input type="search" name="q" placeholder="word or number" aria-label="search">
<label>sort by <select name="sort"><option value="-1">latent</option>{options}</select></label>
<label><input type="checkbox" name="descending" checked> highest first</label>
<output name="count">{count} latents</output>
</form>
<div class="latents">
{articles}
</div>
<script type="application/json" id="latents-columns">{columns}</script>
<script>
(() => {{
  const columns = JSON.parse(document.getElementById("latents-columns").textContent);
  const form = document.getElementById("latents-asked"), {{q, sort, descending, count}} = form.elements;
  const grid = document.querySelector(".latents"), all = [...grid.children];
  const number = article => Number(article.dataset.latent);
  function show() {{
    const text = q.value.trim().toLowerCase(), words = text.split(/\\s+/), column = Number(sort.value);
    const wanted = article => /^\\d+$/.test(text) ? article.dataset.latent === String(Number(text))
      : words.every(word => article.dataset.words.includes(word));
    const value = article => column < 0 ? number(article) : columns[article.dataset.latent][column];
    const sign = column >= 0 && descending.checked ? -1 : 1;
    const order = (a, b) => {{
      const x = value(a), y = value(b);
      if (x === null || y === null) return (x === null) - (y === null) || number(a) - number(b);
      return sign * (x - y) || number(a) - number(b);
    }};
    const found = all.filter(wanted).sort(order);
    grid.replaceChildren(...found);
    count.value = found.length + " latents";
  }}
  q.value = new URLSearchParams(location.search).get("q") || "";
  form.addEventListener("input", show);
  if (q.value) show();
}})();
</script>
````
"""


def page(latents: LatentTable, run: str, folder: Path, address: str, steering: str | None = None) -> str:
    """Return the page as Markdown, and write its pictures into `folder`, which the page finds at `address`.

    steering: the page on which a latent can be steered, if there is one. Every text is escaped.
    """
    from lmm_sae_nb.show.markup import escaped

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    articles = [article(latents, latent, folder, address, steering) for latent in latents.rows]
    options = "".join(
        f'<option value="{n}">{escaped(name.replace("_", " "))}</option>' for n, name in enumerate(latents.columns)
    )
    columns = {latent: [_number(row.get(name)) for name in latents.columns] for latent, row in latents.rows.items()}
    body = BODY.format(
        options=options.replace("`", "&#96;"),
        count=len(articles),
        articles="\n".join(articles).replace("`", "&#96;"),  # or a text could end the block
        columns=json.dumps(columns, separators=(",", ":")),  # numbers alone
    )
    return HEAD.format(run=run) + body


def _number(value: object) -> float | None:
    return float(f"{value:.4g}") if isinstance(value, (int, float)) else None


def article(latents: LatentTable, latent: int, folder: Path, address: str, steering: str | None) -> str:
    """Return one latent as an element of the page, and write its picture, named after its content."""
    from lmm_sae_nb.show.markup import escaped
    from lmm_sae_nb.show.thumbnails import histogram_svg

    row, name, strip = latents.rows[latent], latents.name(latent), latents.strip(latent)
    picture = ""
    if strip:
        file = folder / f"{hashlib.sha256(strip).hexdigest()[:16]}.webp"
        file.write_bytes(strip)
        description = escaped(f"top images of latent {latent}, {name}")
        picture = f'<img loading="lazy" src="{address}/{file.name}" alt="{description}" width="288" height="114">'
    kind = f"<i>{escaped(str(row['kind']))}</i>" if row.get("kind") else ""
    words = escaped(" ".join(str(value) for value in row.values() if isinstance(value, str)).lower())
    histogram = latents.histogram(latent)
    bars = histogram_svg(histogram.counts, histogram.edges, histogram.label)
    table = latents.details(latent)
    if steering:
        table += f'<p><a href="{escaped(steering)}">steer it</a>: <code>panel.choose({latent})</code></p>'
    return (
        f'<article id="latent-{latent}" data-latent="{latent}" data-words="{words}">'
        f'<a href="#latent-{latent}">{latent}</a> <b>{escaped(name)}</b> {kind} {picture}'
        f"<details><summary>all values</summary>{bars}{table}</details></article>"
    )


def write(run: str, book: Path, steering: str | None) -> None:
    """Write `features.md` and its pictures into the book's source."""
    from lmm_sae_nb.show.latent_table import LatentTable

    try:
        latents = LatentTable.load(run)
    except FileNotFoundError:
        text = NOTHING.format(run=run)
    else:
        text = page(latents, run, book / "_static" / "features", "_static/features", steering)
    (book / "features.md").write_text(text, encoding="utf-8")
