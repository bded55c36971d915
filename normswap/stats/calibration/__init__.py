"""Fitting the affines of converted norms to what the original model computes on data."""
