"""Figures, tables and widgets of the pages. They take results and compute none.

Read in this order: `plots` (every figure under one name), made of `style`, `charts`, `pictures` and `tables`; `report`
(headline, findings, metrics, provenance) and `seed_study` (the same pages for other SAEs); `latent_table` and
`thumbnails` (what is known of each latent); the widgets `feature_browser`, `steering_panel` and `rater`.
"""
