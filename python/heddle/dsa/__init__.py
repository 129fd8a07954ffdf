"""DSA indexers for Hugging Face models: learnt from a model's own attention, saved, and run at prefill and decode.

    indexer = heddle.dsa.fit_indexer(model, ids)
    indexer.save("indexer.safetensors")

    heddle.hf.register()
    model.set_attn_implementation("heddle")
    with heddle.dsa.load("indexer.safetensors").selecting(model, budget=512):
        model.generate(prompt)

Needs torch, transformers and safetensors: pip install 'heddle-attention[dsa]'.
"""

try:
    import safetensors  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"heddle.dsa needs torch, transformers and safetensors ({error}): pip install 'heddle-attention[dsa]'",
        name=error.name,
    ) from error

from heddle.dsa._file import VERSION, load
from heddle.dsa._fit import fit_indexer
from heddle.dsa._indexer import Indexer, Watch

__all__ = ["VERSION", "Indexer", "Watch", "fit_indexer", "load"]
