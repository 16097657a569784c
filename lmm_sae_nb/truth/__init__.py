"""Is an explanation true? Where label maps tell which concept is where, sections 2.2 and 3.2 can be checked.

Read in this order: `label_maps` (which concept covers which pixels and patches), `common_concept` (the concept that a
set of masked images has in common), `responses` (what else a latent responds to), `accuracy` (are explanations and
refusals right), `detectors` (does a latent detect each concept of the world, and was it explained as that concept).
"""
