"""Where the norms of a model are, and what stands around them."""
