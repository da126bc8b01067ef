"""The shapes of operators in real models."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a layer's operators need to know of a model."""

    name: str
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """Products of a layer as they run: name → (out_features, in_features)."""
        qkv = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        return {
            "qkv": (qkv, self.hidden),
            "o": (self.hidden, self.num_heads * self.head_dim),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }


MODELS = {
    shape.name: shape
    for shape in (
        ModelShape("smollm2-135m", 576, 1536, 9, 3, 64),
        ModelShape("qwen2.5-0.5b", 896, 4864, 14, 2, 64),
        ModelShape("llama-1.5b", 2048, 5632, 32, 8, 64),
    )
}
