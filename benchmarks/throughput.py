"""Measure tokens per second of the engine and of transformers' own generation, in one run.

    python benchmarks/throughput.py [--model M] [--threads 1] [--dtype bfloat16]

All contenders answer the same prompts greedily with the same weights, dtype and number of threads. Their
answers are checked with the dense model: if a token is not (nearly) the most likely one, the contender fails,
and its time is not printed.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers as tf

if __package__:
    from . import common
else:
    import common

from cupaged.engine import LLM, SamplingParams
from cupaged.engine.model.loader import load_model

TOPICS = ("paging", "caches", "a lighthouse", "the sea", "prime numbers", "bread", "trains", "an old map")
Answers = list[list[int]]


def prompts(tokenizer: tf.PreTrainedTokenizerBase, count: int) -> Answers:
    """Return questions of different lengths in the model's chat template, as token IDs."""
    token_ids = []
    for i in range(count):
        question = " ".join(
            ["Tell me a story about", *(TOPICS[(i + j) % len(TOPICS)] + "," for j in range(i % 7 + 1))]
        )
        text = question
        if tokenizer.chat_template:
            message = [{"role": "user", "content": question}]
            text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        token_ids.append(tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"])
    return token_ids


def ours(options: argparse.Namespace, ids: Answers) -> Callable[[], Answers]:
    llm = LLM(options.model, device=options.device, dtype=options.dtype, max_model_len=2048)
    params = SamplingParams(temperature=0, max_tokens=options.tokens, ignore_eos=True)

    def run() -> Answers:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in ids], params, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]

    return run


def generate(model: tf.PreTrainedModel, options: argparse.Namespace, ids: Answers) -> Callable[[], Answers]:
    """Return a run of transformers on one static batch, padded on the left to the longest prompt."""
    longest = max(map(len, ids))
    batch = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in ids], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in ids], device=model.device)
    config = tf.GenerationConfig(
        max_new_tokens=options.tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )

    def run() -> Answers:
        return model.generate(batch, attention_mask=mask, generation_config=config)[:, longest:].tolist()

    return run


def generate_batch(
    model: tf.PreTrainedModel, options: argparse.Namespace, ids: Answers
) -> Callable[[], Answers]:
    """Return a run of transformers' continuous batching."""
    config = tf.GenerationConfig(
        max_new_tokens=options.tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )

    def run() -> Answers:
        outputs = model.generate_batch(ids, generation_config=config, progress_bar=False)
        by_prompt = {tuple(o.prompt_ids): o.generated_tokens for o in outputs.values()}
        return [by_prompt[tuple(prompt)] for prompt in ids]

    return run


@torch.inference_mode()
def complaint(
    model: tf.PreTrainedModel, ids: Answers, answers: Answers, tokens: int, slack: float
) -> str | None:
    """Check the answers with a dense forward pass over each; return what is wrong, or None.

    Args:
        tokens: number of tokens that each answer must have.
        slack: maximum difference between the largest logit and a token's: with other rounding errors, greedy
            answers diverge.
    """
    if [len(answer) for answer in answers] != [tokens] * len(ids):
        return f"not every answer has {tokens} tokens"
    worst = 0.0
    for prompt, answer in zip(ids, answers):
        row = torch.tensor([prompt + answer], device=model.device)
        logits = model(row).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(1, row[0, len(prompt) :, None])[:, 0]
        worst = max(worst, (logits.max(dim=1).values - chosen).max().item())
    return None if worst <= slack else f"a token's logit is {worst:.2f} below the largest, {slack} is allowed"


def main(arguments: list[str] | None = None) -> int:
    """Run all contenders; return 1 if the answers of one are wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="directory or hub id (default: the demo model)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=100, help="new tokens a request (default: 100)")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each; the median counts")
    parser.add_argument("--out", type=Path, help="directory for the JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    dense, tokenizer = load_model(
        options.model, dtype=options.dtype, device=options.device, attn_implementation="sdpa"
    )
    slack = 0.05 if dense.dtype == torch.float32 else 1.0
    ids = prompts(tokenizer, options.requests)
    runs = {
        "cupaged": ours(options, ids),
        "transformers generate": generate(dense, options, ids),
        "transformers generate_batch": generate_batch(dense, options, ids),
    }
    wrong = 0
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in runs.items():
        if problem := complaint(dense, ids, run(), options.tokens, slack):  # this run also warms up
            print(f"{name}: WRONG, {problem}", file=sys.stderr)
            wrong = 1
            del rates[name]
    for _ in range(options.rounds):  # interleaved, so that a slow phase of the machine affects all of them
        for name in rates:
            gc.collect()
            start = time.perf_counter()
            runs[name]()
            _synchronize(options.device)
            rates[name].append(options.requests * options.tokens / (time.perf_counter() - start))
    our_rate = statistics.median(rates.get("cupaged", [float("nan")]))
    print(f"{'':<30} {'tokens/s':>9} {'cupaged is':>11}")
    results = []
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"{name:<30} {median:>9.1f} {our_rate / median:>10.2f}x")
        results.append({"name": name, "tokens_per_s": median, "all": values})
    if options.out:
        setting = {"model": options.model or "SmolLM2-135M-Instruct", "dtype": str(dense.dtype)}
        setting |= {"requests": options.requests, "new_tokens": options.tokens, "runs": results}
        device = torch.device(options.device)
        common.write(
            options.out, common.result_name("throughput", device), common.environment(device), setting
        )
    return wrong


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
