"""Generate Picture World, and train the small models that live in it.

A scene is a pure function of its seed: pixels, a label map for each kind of concept, and the facts that questions are
made from. Nothing outside this folder and `benchmarks` imports it, except notebook A1 and tests. The other notebooks
meet it as data and weights on disk.

In reading order: `world` (scenes, questions, data sets), `llava` (the model under study), `explainer` (the model that
names latents), `scorers` (CLIPSeg and CLIP), `instructblip` (another architecture). All trainings use
`training_loop`. `python -m lmm_sae_nb.pictureworld --help` lists the commands.
"""
