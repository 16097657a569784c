"""The model under study: a small LLaVA-NeXT, trained from nothing.

In reading order: `model` (the Hugging Face classes with small numbers), `train_eye` (patches learn to point at words),
`train_language` (answers about scenes), `exam` (answers on held-out scenes), `readme_picture` (the README's picture).
"""
