"""Passes over data that estimate statistics."""
