"""Norms whose gain and offset are made of the input, or of another one."""
