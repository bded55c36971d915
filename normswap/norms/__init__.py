"""The norms themselves: layers usable on their own, and how each is read and started."""
