"""A model of another architecture (Table 4): an InstructBLIP with the eye and the language model of the LLaVA-NeXT.

In reading order: `model`, `train`.
"""
