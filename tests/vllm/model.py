"""A tiny Llama with random weights, made on the spot: real shapes, no download."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

SMALL = dict(hidden=64, layers=2, heads=2, kv_heads=2, head=32, intermediate=128, vocab=512)
# 26 M parameters, 16 KiB of KV a token: large enough that prefill dominates a request.
LARGE = dict(hidden=512, layers=8, heads=8, kv_heads=8, head=64, intermediate=1376, vocab=2048)


def make(directory: Path, size: dict[str, int] = SMALL, seed: int = 7) -> Path:
    """Writes config.json and model.safetensors, unless they are there."""
    if (directory / "model.safetensors").is_file():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size["hidden"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "num_key_value_heads": size["kv_heads"],
        "head_dim": size["head"],
        "intermediate_size": size["intermediate"],
        "vocab_size": size["vocab"],
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> torch.Tensor:
        # Large enough that a wrong KV byte changes the most likely token.
        return (torch.randn(*shape, generator=generator) * (2.0 / shape[-1] ** 0.5)).to(torch.bfloat16)

    hidden, head, inter = size["hidden"], size["head"], size["intermediate"]
    tensors = {
        "model.embed_tokens.weight": weight(size["vocab"], hidden) * 8,
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        "lm_head.weight": weight(size["vocab"], hidden),
    }
    for layer in range(size["layers"]):
        at = f"model.layers.{layer}"
        tensors[f"{at}.input_layernorm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        tensors[f"{at}.post_attention_layernorm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        tensors[f"{at}.self_attn.q_proj.weight"] = weight(size["heads"] * head, hidden)
        tensors[f"{at}.self_attn.k_proj.weight"] = weight(size["kv_heads"] * head, hidden)
        tensors[f"{at}.self_attn.v_proj.weight"] = weight(size["kv_heads"] * head, hidden)
        tensors[f"{at}.self_attn.o_proj.weight"] = weight(hidden, size["heads"] * head)
        tensors[f"{at}.mlp.gate_proj.weight"] = weight(inter, hidden)
        tensors[f"{at}.mlp.up_proj.weight"] = weight(inter, hidden)
        tensors[f"{at}.mlp.down_proj.weight"] = weight(hidden, inter)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


if __name__ == "__main__":
    print(make(Path(sys.argv[1]), LARGE if "--large" in sys.argv else SMALL))
