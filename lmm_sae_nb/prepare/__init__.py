"""Write the data that a preset reads, from the hub or from files: `python -m lmm_sae_nb.prepare --preset small`.

In reading order: `recipe` (the preset's section `prepare`), `records` (rows of a source as samples, images or traps),
`sources` (rows in a random order, file by file), `write` (parts that survive a kill, and the whole data set).
"""
