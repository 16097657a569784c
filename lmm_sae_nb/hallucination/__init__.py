"""Sections 4.3 and 4.4: answers from memory against the image, and a clamp that corrects some of them.

- `cases`: questions on which memory and the image disagree, or agree.
- `answers`: what the model answers under many settings of the SAE, side by side.
- `text_latents`: latents that stand for written words, and what clamping them should do.
- `fit`: clamps that are fitted by gradient, for both answers.
- `search`: choose the clamp that cures most within limits on what it may harm.
- `report`: measure the chosen clamp on cases that took no part in the choice.
- `new_questions`: fit a clamp on half of the questions, and try it on the other half.
- `presence`: POPE, questions whether something is in an image.
- `captions`: CHAIR, things that a caption mentions and the image does not show.
"""
