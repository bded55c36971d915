"""The demo: a small network on real digits, warmed up, converted and reverted, in numbers."""
