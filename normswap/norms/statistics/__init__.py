"""Norms that pool their statistics over something else than BatchNorm does, and BatchNorm."""
