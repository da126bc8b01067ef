"""What runs in each step: token ids and block ids in, plans for the executor out."""
