"""The sections of the report, in order."""

from ..report import Section
from . import attention, ceilings, check, engine, fused, host, latent, memory, mixed, sampling

SECTIONS = (
    Section("check", "right or wrong, against float64", 90, check.run, timed=False),
    Section("ceilings", "what the machine can do", 20, ceilings.run),
    Section("decode", "decode against dense attention and other libraries", 120, attention.decode),
    Section("prefill", "prefill against dense attention and other libraries", 60, attention.prefill),
    Section("latent", "latent attention beside torch's over dense rows", 30, latent.run),
    Section("mixed", "prefill chunks and decodes in one call, against their parts", 15, mixed.run),
    Section("memory", "writing, copying, swapping; the cache's allocation", 60, memory.run),
    Section("fused", "norms, activations, RoPE with the cache write; against a copy", 15, fused.run),
    Section("sampling", "sampling tokens, beside torch and FlashInfer", 15, sampling.run),
    Section("engine", "decode steps of the whole engine, by graphs and overlap", 70, engine.run),
    Section("host", "host time of a call", 20, host.run, needs_gpu=True),
)
