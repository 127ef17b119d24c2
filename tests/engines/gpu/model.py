"""A small Llama and its EAGLE draft, with seeded weights: python model.py FOLDER

The draft's only layer is the target's first, and the target's other layers change little. So a draft token is right if
the draft's attention read the right rows of the KV cache, and mostly wrong if it didn't: a wrong draft table shows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

SEED = 17
LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCABULARY = 4, 4, 2, 64, 256, 512
# Scale of what a layer's attention and MLP add to the hidden states: for the first layer, and for all others.
FIRST, OTHERS = (3.0, 0.3), (0.05, 0.05)
# Sharp attention, so that the next token depends on few rows of the KV cache.
SHARPNESS = 2.0

CONFIG = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCABULARY,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def main(folder: Path) -> None:
    generator = torch.Generator().manual_seed(SEED)

    def weight(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * scale / columns**0.5).bfloat16()

    embedding = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    embedding = (embedding / embedding.pow(2).mean(-1, keepdim=True).sqrt()).bfloat16()
    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    target = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": ones,
        "lm_head.weight": weight(VOCABULARY, HIDDEN),
    }
    # The draft's input is the embedding concatenated with the target's hidden states. fc keeps only the embedding.
    draft = {
        "embed_tokens.weight": embedding,
        "fc.weight": torch.cat([torch.eye(HIDDEN), torch.zeros(HIDDEN, HIDDEN)], 1).bfloat16(),
        "fc.bias": torch.zeros(HIDDEN, dtype=torch.bfloat16),
    }
    for layer in range(LAYERS):
        attention, mlp = OTHERS if layer else FIRST
        weights = {
            "self_attn.q_proj.weight": weight(HEADS * HEAD_DIM, HIDDEN, SHARPNESS),
            "self_attn.k_proj.weight": weight(KV_HEADS * HEAD_DIM, HIDDEN, SHARPNESS),
            "self_attn.v_proj.weight": weight(KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.o_proj.weight": weight(HIDDEN, HEADS * HEAD_DIM, attention),
            "mlp.gate_proj.weight": weight(2 * HIDDEN, HIDDEN),
            "mlp.up_proj.weight": weight(2 * HIDDEN, HIDDEN),
            "mlp.down_proj.weight": weight(HIDDEN, 2 * HIDDEN, mlp),
            "post_attention_layernorm.weight": ones,
        }
        target |= {f"model.layers.{layer}.{name}": tensor for name, tensor in weights.items()}
        target[f"model.layers.{layer}.input_layernorm.weight"] = ones
        if layer == 0:
            draft |= {f"layers.0.{name}": tensor for name, tensor in weights.items()}
    for name, architecture, layers, weights in (
        ("target", "LlamaForCausalLM", LAYERS, target),
        ("draft", "LlamaForCausalLMEagle", 1, draft),
    ):
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        config = CONFIG | {"architectures": [architecture], "num_hidden_layers": layers}
        (place / "config.json").write_text(json.dumps(config, indent=1))
        (place / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
        # Cloned, because safetensors refuses tensors that share memory.
        tensors = {key: tensor.contiguous().clone() for key, tensor in weights.items()}
        save_file(tensors, str(place / "model.safetensors"), metadata={"format": "pt"})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
