"""Section 3.1: predict what the paper's own scale needs, and test the prediction on a narrow twin of its model.

In reading order: `models` (parameters, patches and products of a model without its weights), `costs` (work, memory
and disk of each stage), `presets` (a preset's costs and the commands that run it), `geometry_twin` (a model of the
real geometry at a narrow width, run on this machine).
"""
