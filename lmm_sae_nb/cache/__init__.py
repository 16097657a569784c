"""Section 2.2: find the images, patches and words that excite each latent.

- `activations.py`: one pass over the images, for one SAE or for several.
- `encode_images.py`: from images to latents, a batch at a time.
- `top_images.py`: the running top images of every latent.
- `resume.py`: the state of a pass on disk, and how the states of several processes merge.
- `sparse_store.py`: every activation of every image.
- `latent_cache.py`: the result, `LatentCache`.
- `texts.py`: the same for the tokens of texts.
- `sides.py`: whether a latent responds to images, to text, or to both.
"""
