"""Sparse autoencoders on large multimodal models: train, cache, name, score, steer, attribute."""

__version__ = "0.1.0"
