"""Sections 3.1, 3.3 and 3.4: compare SAEs of several layers, models and sizes.

In reading order: `saes` (train and cache several SAEs in one pass over the model), `scored` (explain and score each),
`depth` (what else changes with depth: steering, attribution, and what image tokens still do), `report` (the metrics
of the stage, and rows for tables and figures), `sentences` (what was found, in words).
"""
