"""HTTP and text: the OpenAI API in front of an engine. Knows no tensors and imports no numpy."""
