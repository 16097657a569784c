"""Measures of latents that the literature reports and the paper does not, each as one documented function."""
