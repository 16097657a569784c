"""Picture World: generated scenes with their ground truth, and the training of the models that live in it.

A scene is a pure function of its seed: pixels, a mask for every concept present, and the facts that questions
are made from. Nothing outside this package imports it; notebooks meet it as data and weights on disk.

Modules, from the bottom up: `concepts` (every word), `art` (how a thing looks), `scenes` (what is where),
`questions` (what can be asked and answered), `minds` (the Hugging Face model and processor), `tower`
(teaching the eye), `lessons` (teaching the language model), `exam` (held-out answers), `shelf` (data sets on disk).
"""
