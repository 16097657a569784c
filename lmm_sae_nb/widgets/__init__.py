"""Faces for the package's calls, in a notebook: a steering panel, a feature browser, a rater of explanations.

They compute nothing themselves, and need nothing in the browser but ipywidgets' own widgets.
"""

from lmm_sae_nb.widgets.browsing import FeatureBrowser
from lmm_sae_nb.widgets.rating import Rater
from lmm_sae_nb.widgets.steering import SteeringPanel

__all__ = ["FeatureBrowser", "Rater", "SteeringPanel"]
