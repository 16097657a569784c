"""Large multimodal models interpret the features of large multimodal models.

The folders, from the ground up; a folder imports only from folders to its left:

    support · model · sae · chat · train · cache · interpret · truth · score · steer · attribute · hallucination · measures · compare · controls · full_scale · show

What most users need is here. Each name is loaded when it is first used.
"""  # noqa: E501  (the line stands in README, CONTRIBUTING and a test as well)

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmm_sae_nb.attribute.attribution import linear
    from lmm_sae_nb.cache.activations import cache_activations
    from lmm_sae_nb.cache.latent_cache import LatentCache
    from lmm_sae_nb.interpret.exemplars import exemplars
    from lmm_sae_nb.interpret.explain import explain_latents
    from lmm_sae_nb.model.lmm import LMM
    from lmm_sae_nb.sae.in_place import SAEInPlace
    from lmm_sae_nb.sae.topk import SAE, Latents, TopKSAE
    from lmm_sae_nb.steer.steering import Edit, Scope, steered
    from lmm_sae_nb.support.images import open_images
    from lmm_sae_nb.train.evaluate import evaluate_sae
    from lmm_sae_nb.train.training import train_sae

__version__ = "0.1.0"

HOMES = {
    "LMM": "model.lmm",
    "SAE": "sae.topk",
    "TopKSAE": "sae.topk",
    "Latents": "sae.topk",
    "SAEInPlace": "sae.in_place",
    "train_sae": "train.training",
    "evaluate_sae": "train.evaluate",
    "open_images": "support.images",
    "cache_activations": "cache.activations",
    "LatentCache": "cache.latent_cache",
    "exemplars": "interpret.exemplars",
    "explain_latents": "interpret.explain",
    "Edit": "steer.steering",
    "Scope": "steer.steering",
    "steered": "steer.steering",
    "linear": "attribute.attribution",
}
__all__ = [
    "LMM", "SAE", "Edit", "LatentCache", "Latents", "SAEInPlace", "Scope", "TopKSAE", "cache_activations",
    "evaluate_sae", "exemplars", "explain_latents", "linear", "open_images", "steered", "train_sae",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(HOMES)}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
