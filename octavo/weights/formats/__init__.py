"""From the bytes of a file's tensor to the stored forms of `graph/tensors.py`: a file a family."""
