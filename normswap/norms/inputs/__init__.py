"""Extra inputs of norms: a domain, a mask, a label, a style, beside the tensor that flows."""
