"""Planning conversions, making them and taking them back."""
