"""Every causal language model class of transformers through the engine, beside its own forward.

`python -m tests.engine.sweep --write docs/models.md` writes the table of what runs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cupaged.engine import RequestOutput, SamplingParams
from cupaged.engine.model.attention_probe import SUPPORTED
from tests import tiny_configs, tiny_models
from tests.tiny_configs import WINDOW

from .harness import run, small_engine

PROMPT_TOKENS = 3 * WINDOW + 5
TOLERANCE = 1.5e-5  # of log probabilities, in float32
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=1, prompt_logprobs=1)
AS_IT_IS = "as it is"
# Entries that a config.json may have kept from another model. Classes that have them of their own obey them.
STRAY: dict[str, dict[str, Any]] = {
    "a window": {"sliding_window": WINDOW},
    "an unused window": {"sliding_window": WINDOW, "use_sliding_window": False, "max_window_layers": 1},
    "layer types": {
        "sliding_window": WINDOW,
        "use_sliding_window": True,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "chunks": {"attention_chunk_size": WINDOW},
}
_HEADER = """# Supported models

Made with transformers {version} by `python -m tests.engine.sweep --write docs/models.md`; `make test-all`
checks it. Each class ran as a tiny model with drawn weights: greedy tokens as transformers picks them, log
probabilities of prompt and output within 1.5e-5 of transformers' own in float32. So it did with a
`sliding_window`, `layer_types` or `attention_chunk_size` that another model left in its `config.json`. What
is refused is refused when it is loaded, with this reason.

{count} of {total} run.

| `model_type` | class | |
|---|---|---|
"""


def save(model_type: str, directory: Path, seed: int) -> None:
    """Write a tiny model of the type, its weights drawn."""
    model = tf.AutoModelForCausalLM.from_config(tiny_configs.tiny_config(model_type), dtype=torch.float32)
    tiny_configs.draw_weights(model, seed)
    model.save_pretrained(directory)
    tiny_models.tokenizer().save_pretrained(directory)


def outcomes(
    model_type: str, directory: Path, seed: int, stray: dict[str, dict[str, Any]]
) -> dict[str, str | None]:
    """Run a tiny model as it is and with stray entries in its config.json.

    Returns:
        Why each is refused, None where it runs. Entries that transformers itself refuses in this class, or
        that change which weights there are, are left out.

    Raises:
        AssertionError: tokens or log probabilities are not those of transformers.
    """
    save(model_type, directory, seed)
    path = directory / "config.json"
    original = path.read_text()
    found = {}
    for name, entries in {AS_IT_IS: {}, **stray}.items():
        config = json.loads(original)
        of_text = config.get("text_config", config)
        for key, value in entries.items():
            layers = of_text.get("num_hidden_layers") or 2
            of_text[key] = (value * layers)[:layers] if isinstance(value, list) else value
        path.write_text(json.dumps(config))
        reference = _reference(directory)
        if reference is not None or name == AS_IT_IS:
            try:
                found[name] = _outcome(directory, reference, seed)
            except AssertionError as error:
                raise AssertionError(f"{model_type}, {name}: {error}") from error
    return found


def _reference(directory: Path) -> torch.nn.Module | None:
    """The model as transformers runs it; None if it does not take the configuration for these weights."""
    try:
        model, report = tf.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    except Exception:
        return None
    complete = not any(report[kind] for kind in ("missing_keys", "mismatched_keys"))
    return model.eval() if complete else None


def _outcome(directory: Path, reference: torch.nn.Module | None, seed: int) -> str | None:
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(2, tiny_models.PAD, (PROMPT_TOKENS,), generator=generator).tolist()
    try:
        engine = small_engine(str(directory))
    except ValueError as error:
        return reason(str(error))
    assert reference is not None, "transformers does not load it"
    output = run(engine, {"x": ({"prompt_token_ids": prompt}, GREEDY)})["x"]
    assert_as_transformers(output, reference)
    return None


def assert_as_transformers(output: RequestOutput, reference: torch.nn.Module) -> None:
    """Assert that a greedy output and all its log probabilities are those of one forward over its tokens,
    without a cache of any kind."""
    prompt, generated = output.prompt_token_ids, output.outputs[0].token_ids
    token_ids = [*prompt, *generated]
    with torch.no_grad():
        logits = reference(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]
    wanted = logits[:-1].float().log_softmax(-1)
    of_tokens = wanted.gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]
    entries = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    found = torch.tensor([entry[token].logprob for entry, token in zip(entries, token_ids[1:])])
    errors = (found - of_tokens).abs()
    worst = int(errors.argmax())
    assert errors[worst] <= TOLERANCE, f"token {worst + 1} is off by {errors[worst]:.1e}"
    behind = (wanted.max(-1).values - of_tokens)[len(prompt) - 1 :]
    assert behind.max() <= TOLERANCE, f"output token {int(behind.argmax())} is not the most likely one"


def reason(message: str) -> str:
    """Return what a refusal says of the model, without the model's name and what is supported."""
    _, _, why = message.partition(" is not supported: ")
    if why:
        assert why.endswith(f"; {SUPPORTED}"), message
        return why.removesuffix(f"; {SUPPORTED}")
    _, _, why = message.partition(" as a decoder: ")
    assert why, f"a refusal without a reason: {message}"
    return why.partition(" for this kind of")[0]


def row(model_type: str, why: str | None) -> str:
    """Return a model's line of the table."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    return f"| {model_type} | {name} | {'runs' if why is None else why} |"


def table() -> str:
    rows = {kind: f"not tried: {why}" for kind, why in tiny_configs.NOT_BUILT.items()}
    for model_type in tiny_configs.MODEL_TYPES:
        with tempfile.TemporaryDirectory() as directory:
            rows[model_type] = outcomes(model_type, Path(directory), 0, {})[AS_IT_IS]
    head = _HEADER.format(
        version=tf.__version__, count=sum(why is None for why in rows.values()), total=len(rows)
    )
    return head + "".join(f"{row(kind, rows[kind])}\n" for kind in sorted(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, required=True, metavar="FILE", help="where the table goes")
    path = parser.parse_args().write
    tf.logging.set_verbosity_error()
    tf.logging.disable_progress_bar()
    torch.zeros(1).exp_()  # as in tests/conftest.py
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(table())


if __name__ == "__main__":
    main()
