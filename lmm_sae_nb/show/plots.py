"""Every figure of the book under one name: `plots.style()`, then `plots.curve(...)`, `plots.images(...)` and so on."""

# ruff: noqa: F401, I001

from lmm_sae_nb.show.charts import (
    TRAINING, agreement, bars, calibration, compared, cross_table, curve, dose_curves, dose_response, histogram, live,
    mean_panels, means, other_saes, proportions, scatter, search_trials, size_panels, stacked, training,
    ways_of_explaining,
)  # fmt: skip
from lmm_sae_nb.show.pictures import (
    changed_pairs, exemplar_strip, heat_map, images, overlap, overlaps, picture_axes, picture_rows, signed_map,
    signed_maps,
)  # fmt: skip
from lmm_sae_nb.show.style import (
    AGAINST, CHANCE, CONCEPT, FOR, LATENT, PAPER, TARGET, WIDTH, panels, style,
)  # fmt: skip
from lmm_sae_nb.show.tables import case_studies, mark_changes, shaded_texts, table, token_html
from lmm_sae_nb.show.texts import literal, one_line, wrapped
