"""Support for every stage of the paper: files, stages and pages, pictures, intervals.

In reading order: `files` (write whole files), `tensor_files` (safetensors), `locks` (one run at a time), `stages`
(`Page` and `Stage`), `notebooks` (what a notebook takes, and how it is run), `images` (open pictures), `intervals`
(means and fractions with intervals), `progress` (progress bars).
"""
