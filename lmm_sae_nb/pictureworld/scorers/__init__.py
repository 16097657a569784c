"""The two models that score explanations (section 3.2): a CLIPSeg and a CLIP.

In reading order: `clipseg` (where a concept is), `clip` (how well a name fits an image), `exam` (both on held-out
scenes).
"""
