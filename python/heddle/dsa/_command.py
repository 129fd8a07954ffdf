"""`heddle indexer`: fits a DSA indexer to a language model."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from heddle._errors import HeddleValueError, refuse
from heddle.demo import add_inputs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `heddle indexer`."""
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("out", type=Path, metavar="FILE", help="the indexer, safetensors")
    add_inputs(parser)
    parser.add_argument(
        "--tokens", type=int, default=8192, metavar="N", help="how many are learnt from: the context it is meant for"
    )
    parser.add_argument("--heads", type=int, default=8, metavar="N", help="index heads of a layer")
    parser.add_argument("--dim", type=int, default=64, metavar="N", help="dimension of an index head")
    parser.add_argument("--steps", type=int, default=240, metavar="N", help="Adam's steps, each layer")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and queries")


def run(args: argparse.Namespace) -> int:
    """Fits, saves and says how well it learnt. Returns 0."""
    if not args.out.absolute().parent.is_dir():
        raise refuse(HeddleValueError, "value", "FILE", f"{args.out}: the directory does not exist")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    from heddle import dsa
    from heddle.demo import _inputs
    from heddle.demo._show import Terminal

    show = Terminal()
    name, path = _inputs.find_model(args.model)
    _, text = _inputs.read_text(args.text)
    with show.working(100.0) as progress:
        with progress.step(f"loading {name}", 8.0):
            tokenizer, model = _inputs.load_model(path)
        ids = _inputs.tokenize(tokenizer, text, args.tokens, model.config.max_position_embeddings)
        with progress.step(f"fitting on {args.tokens:,} tokens", 92.0) as tick:
            started = time.perf_counter()
            sizes = {"heads": args.heads, "dim": args.dim, "steps": args.steps, "seed": args.seed}
            indexer = dsa.fit_indexer(model, ids, name=name, progress=tick, **sizes)
            seconds = time.perf_counter() - started
    indexer.save(args.out)
    before, after = (sum(pair[i] for pair in indexer.about["kl"].values()) / len(indexer.layers) for i in (0, 1))
    show.console.print(
        f"{len(indexer.layers)} layers in {seconds:.0f} s; KL divergence of held-out queries, mean over layers: "
        f"{before:.2f} nats before, {after:.2f} after"
    )
    show.written("Indexer", args.out)
    return 0
