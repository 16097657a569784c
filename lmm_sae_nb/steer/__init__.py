"""Sections 2.3, 4.1 and 4.2: clamp latents while the model answers, and see whether it says their names.

Read in this order: `steering` (edits, scopes and equations 3 to 6), `experiments` (feelings and stories, picture and
word, ranks), `objects` (a hundred objects on a white image), `relevance` (how relevant an answer is to a concept).
"""
