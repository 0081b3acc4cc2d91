"""Load a model and make its KV cache: what each device needs, or each rank of several."""

from __future__ import annotations

import platform

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import EngineConfig
from .attention import ATTENTION_NAME, register_attention
from .cache_size import CacheSize, choose_cache_size
from .kv_cache import KVCache, KVShape
from .kv_scales import calibrate
from .loader import load_model, model_length
from .model_files import check_length
from .model_runner import ModelRunner
from .progress import without_bars
from .tensor_parallel import Ranks, localise
from .vocabulary import Vocabulary


class Worker:
    """Hold a model on a device, or one rank's part of it, and its KV cache.

    All ranks take the same steps in here, as the model's operations wait for those of the others.

    Args:
        model: a directory, a hub ID, a path to a ``.gguf`` file, or None for the demo model.
        config: settings.
        device: the device.
        ranks: the group of ranks among which the model is divided; None: it is not.

    Raises:
        ValueError: the model or a setting cannot be served.
    """

    def __init__(
        self, model: str | None, config: EngineConfig, device: torch.device, ranks: Ranks | None = None
    ) -> None:
        self.config, self.device = config, device
        self.model, self.tokenizer = self._load(model, ranks)
        self.runner = ModelRunner(self.model)
        if config.kv_cache_dtype == "auto":  # there are no quantised latents
            self.runner.cache_latents()
        fusion = self.runner.rewrite(config.block_size, config.fuse)
        self.vocabulary = Vocabulary.of(self.model)
        self.shape = self.runner.kv_shape(config.block_size, config.kv_cache_dtype)
        model_len = check_length(config.max_model_len, model_length(self.model.config))
        self.size = choose_cache_size(config, self.runner, self.shape, model_len, ranks)
        self.cache = self._allocate_cache(self.shape, self.size)
        if ranks is not None:
            fused = "not asked for" if fusion is None else fusion.report.line()
            ranks.check_agreement(
                {
                    "the version of torch": torch.__version__,
                    "the version of transformers": transformers.__version__,
                    "the version of Python": platform.python_version(),
                    "the KV cache": f"{self.shape}, {self.size}",
                    "the vocabulary": str(self.vocabulary),
                    "the fusion": fused,
                }
            )

    def _load(
        self, model: str | None, ranks: Ranks | None
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        register_attention()
        with without_bars(model is None):  # the demo model is small, and its download has a bar
            loaded, tokenizer = load_model(
                model,
                dtype=self.config.dtype,
                device=str(self.device),
                attn_implementation=ATTENTION_NAME,
                max_model_len=self.config.max_model_len,
                trust_remote_code=self.config.trust_remote_code,
                tensor_parallel_size=self.config.tensor_parallel_size,
            )
        if ranks is not None:
            localise(loaded, ranks)
            ranks.wait()
        if self.device.type == "cpu":
            # The first exp of a process is off by 1.5e-4 if several threads compute it (pytorch#188792).
            torch.zeros(1).exp_()
        return loaded, tokenizer

    def _allocate_cache(self, shape: KVShape, size: CacheSize) -> KVCache:
        self.runner.settle_frequencies(size.max_model_len)
        longest_prompt = min(size.max_model_len, self.config.max_num_batched_tokens)
        scales = calibrate(self.runner, shape, self.vocabulary.size, longest_prompt)
        cache = KVCache(shape, size.num_gpu_blocks, size.num_cpu_blocks, self.device, scales)
        if not self.config.enforce_eager:
            self.runner.capture_graphs(cache, self.config.max_num_seqs, size.max_model_len)
        return cache
