"""Score explanations (section 3.2): does a concept's name fit what excites the latent, and does a judge agree?

In reading order:

- `masks`: where a latent is active, where a concept is, and the IoU of the two, in two modes.
- `batches`, `segmenters`, `similarity`: the models that find a concept in an image, or compare image and text.
- `scores`: the types that hold scores: a column, a latent's comparison with chance, and all of them together.
- `iou`, `clip`: IoU and CLIP score of latents, each beside chance.
- `latents`: choose the latents, and score them all (Table 1's data).
- `tables`: means by kind of concept (Table 1), and the metrics.
- `judges`: a model, or the ground truth, judges explanations (Table 2).
- `ratings`: people judge them, and how far people agree.
"""
