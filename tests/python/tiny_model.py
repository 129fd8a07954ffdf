"""A small random language model, and texts for it."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

LENGTH = 320


def make_model(layers=3, seed=0, **changes):
    """Random weights, large enough for attention to be far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": 40,
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": layers,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 512,
            "initializer_range": 0.22,
            "pad_token_id": None,
            "bos_token_id": None,
            "eos_token_id": None,
            **changes,
        }
    )
    return LlamaForCausalLM(config).eval()


def text(seed, length=LENGTH):
    """A random walk over the tokens, int64 [1, length]."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.cumsum(rng.integers(-3, 4, length)) % 40)[None]
