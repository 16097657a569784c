"""The training step of a TopK SAE here and in other libraries, each measured in a process of its own."""
