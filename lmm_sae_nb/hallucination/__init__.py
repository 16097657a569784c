"""Sections 4.3 and 4.4: answers from memory against the image, and a clamp that corrects some of them.

- `cases`: questions on which memory and the image disagree, or agree.
- `answers`: what the model answers under many settings of the SAE, side by side.
- `text_latents`: latents that stand for written words, and what clamping them should do.
- `search`: choose the clamp that cures most within limits on what it may harm.
- `report`: measure the chosen clamp on cases that took no part in the choice.
"""
