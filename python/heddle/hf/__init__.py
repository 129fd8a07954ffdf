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
    import transformers
    from packaging.version import Version
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"heddle.hf needs torch and transformers 5.20 ({error}): pip install 'heddle-attention[demo]'", name=error.name
    ) from error
if Version(installed := transformers.__version__).release < (5, 20):
    raise ImportError(
        f"heddle.hf needs transformers 5.20, {installed} is installed: pip install 'heddle-attention[demo]'"
    )

from heddle.hf._attention import HeddleAttention, HeddleConfig, options, register
from heddle.hf._cache import HeddleCache
from heddle.hf._mask import heddle_mask

__all__ = ["HeddleAttention", "HeddleCache", "HeddleConfig", "heddle_mask", "options", "register"]
