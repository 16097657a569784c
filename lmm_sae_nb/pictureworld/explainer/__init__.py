"""The explainer: a small Aya Vision that names what masked images have in common (section 2.2).

In reading order: `model`, `masked_sets` (what it learns from), `train_eye` (see masked images), `train` (name sets),
`exam` (held-out sets).
"""
