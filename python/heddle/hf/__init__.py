"""heddle inside Hugging Face transformers.

    import heddle.hf

    heddle.hf.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="heddle")

    with heddle.hf.options(selection=heddle.select.window(1024, n_global=64)):
        model(input_ids)

    cache = heddle.hf.HeddleCache(max_length=4096, format="int8-a")
    model.generate(input_ids, past_key_values=cache)

register() makes heddle an attention implementation of transformers. options() changes what it does within a block:
which keys are read, in which format. HeddleCache keeps the keys and values in paged heddle.KVCache pools, one a layer.

Needs torch and transformers 5.20: pip install 'heddle-attention[demo]'.
"""

try:
    import torch  # noqa: F401
    from transformers import AttentionMaskInterface  # noqa: F401
except ImportError as error:
    raise ModuleNotFoundError(
        f"heddle.hf needs torch and transformers 5.20 ({error}): pip install 'heddle-attention[demo]'", name=error.name
    ) from error

from heddle.hf._attention import HeddleAttention, HeddleConfig, options, register
from heddle.hf._cache import HeddleCache
from heddle.hf._mask import heddle_mask

__all__ = ["HeddleAttention", "HeddleCache", "HeddleConfig", "heddle_mask", "options", "register"]
