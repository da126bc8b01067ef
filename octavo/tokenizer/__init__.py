"""Text to token ids and back: loading, chat templates, decoding. No numpy, no tensors."""
