"""Measures of latents that the literature reports and the paper does not, each as one documented function.

In reading order:

- `image_latents.py`: the activations of all latents on images, which most measures read.
- `monosemanticity.py`: are the images that excite a latent alike?
- `detection_scoring.py`: does its name tell the images that excite it from those that do not?
- `probing.py`: do one, two or five latents say if an image shows a concept?
- `absorption.py`: does a latent for a general concept fall silent where one for a special case is active?
- `consistency.py`: do SAEs of different seeds find the same directions?
- `modality.py`: does a latent respond to images or to text?
- `selectivity.py`: does a latent change with its own concept, and with nothing else?
- `discriminability.py`: which metric tells a good SAE from a bad one?

Left out on purpose: spurious correlation removal (SCR) and targeted probe perturbation (TPP), because an audit of 2026
(arXiv 2605.18229) found that they do not tell good SAEs from bad ones and advises against them; RAVEL and unlearning,
because they need data sets of language models that have no counterpart here.
"""
