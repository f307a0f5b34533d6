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


def make_hybrid(directory: Path) -> Path:
    """A tiny Gemma 3: five layers see a window of 64 tokens, one sees everything."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, sliding_window=64, max_position_embeddings=4096, query_pre_attn_scalar=32,
        initializer_range=0.2,
    )  # fmt: skip
    return _save(Gemma3ForCausalLM, config, directory)


def make_mla(directory: Path) -> Path:
    """A tiny DeepSeek-V2: one latent head for all."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    config = DeepseekV2Config(
        vocab_size=512, hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_shared_experts=1, n_routed_experts=4, num_experts_per_tok=2,
        first_k_dense_replace=2, kv_lora_rank=512, q_lora_rank=None, qk_rope_head_dim=64, qk_nope_head_dim=128,
        v_head_dim=128, max_position_embeddings=4096, initializer_range=0.1, topk_method="greedy", n_group=1,
        topk_group=1, routed_scaling_factor=1.0, head_dim=64,
    )  # fmt: skip
    return _save(DeepseekV2ForCausalLM, config, directory)


def _save(kind: type, config: object, directory: Path) -> Path:
    if not (directory / "config.json").is_file():
        torch.manual_seed(7)
        kind(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


if __name__ == "__main__":
    print(make(Path(sys.argv[1]), LARGE if "--large" in sys.argv else SMALL))
