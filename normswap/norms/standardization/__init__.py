"""Norms that standardize otherwise than by mean and deviation."""
