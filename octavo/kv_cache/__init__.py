"""The KV cache's book-keeping: which block holds whose tokens. Ids only: backends own the bytes."""
