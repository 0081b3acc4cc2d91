"""The engine: requests in, one step at a time, outputs out."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterable, Sized
from numbers import Integral
from os import PathLike, fspath
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from cupaged.device import choose_device

from .config import EngineConfig
from .memory.block_manager import BlockManager
from .model import cache_size, demo_model
from .model.attention import ATTENTION_NAME, register_attention
from .model.cpu_linear import pack_linears
from .model.dry_run import dry_run
from .model.generation_config import ending_token_ids, generation_config, sampling_defaults
from .model.kv_cache import KVCache
from .model.kv_scales import calibrate
from .model.loader import load_model, model_length
from .model.model_files import check_generation_config, check_length
from .model.model_runner import ModelRunner
from .model.progress import without_bars
from .output_processor import OutputProcessor
from .outputs import EngineStats, RequestOutput
from .sampling import bad_words
from .sampling.sampler import Sampler
from .sampling_params import SamplingParams
from .scheduling.contiguous_memory import longest
from .scheduling.failed_step import FailedStep
from .scheduling.preemption import Preemption, Rates
from .scheduling.request import SequenceGroup, Status
from .scheduling.scheduler import Scheduler
from .scheduling.step_plan import Plan
from .validation import is_integer

_log = logging.getLogger("cupaged.engine")

Prompt = str | dict[str, Any]


class LLMEngine:
    """Runs requests over one model. Not thread-safe: one thread adds, steps and aborts.

    Args:
        model: a Hugging Face directory, a hub id, a GGUF file, or None for the demo model.
        config: settings.

    Raises:
        ValueError: the model or a setting cannot be served.
        RuntimeError: there is a GPU that cannot be used as things are installed; the message says what is
            missing.
    """

    def __init__(self, model: str | PathLike[str] | None = None, config: EngineConfig | None = None) -> None:
        self.config = config = config or EngineConfig()
        model = None if model is None else fspath(model)
        check_generation_config(config.generation_config)
        self.device, _ = choose_device(config.device)  # what is missing is said before a model is loaded
        register_attention()
        with without_bars(model is None):  # the demo model is small, and its download has a bar
            loaded, self.tokenizer = load_model(
                model,
                dtype=config.dtype,
                device=str(self.device),
                attn_implementation=ATTENTION_NAME,
                max_model_len=config.max_model_len,
                trust_remote_code=config.trust_remote_code,
            )
        if self.device.type == "cpu":
            # The first exp of a process is off by 1.5e-4 if several threads compute it (pytorch#188792).
            torch.zeros(1).exp_()
            pack_linears(loaded)
        self._runner = ModelRunner(loaded)
        shape = self._runner.kv_shape(config.block_size, config.kv_cache_dtype)
        wanted = check_length(config.max_model_len, model_length(loaded.config))
        num_blocks = cache_size.num_gpu_blocks(config, self._runner, shape, wanted)
        held = longest(config.memory_policy, num_blocks) * config.block_size
        if config.max_model_len is not None and held < wanted:
            run = "" if config.memory_policy == "paged" else " in one run of blocks"
            raise ValueError(
                f"max_model_len is {wanted}, and the KV cache holds {held} tokens{run}: lower it, or give "
                "the cache more memory"
            )
        self.max_model_len: int = min(wanted, held)
        if held < wanted:
            _log.warning("sequences end at %d tokens, which the KV cache holds, not at %d", held, wanted)
        cpu_blocks = cache_size.num_cpu_blocks(config, shape, num_blocks)
        self.model_name = model or demo_model.NAME
        # Longer texts have too many tokens. To count those of a text of megabytes takes seconds.
        self._longest_token = max(map(len, self.tokenizer.get_vocab()))  # characters
        self.max_characters = self.max_model_len * self._longest_token
        self._vocab_size = int(loaded.get_input_embeddings().weight.shape[0])  # type: ignore[index]
        output = loaded.get_output_embeddings()
        # The input may have tokens that are no output, and the tokenizer more than either.
        self._num_samplable = int(getattr(output, "out_features", self._vocab_size))
        self._blocks = BlockManager(num_blocks, cpu_blocks, config.block_size)
        self._rates = Rates(shape.block_bytes)
        self._runner.settle_frequencies(self.max_model_len)
        scales = calibrate(
            self._runner, shape, self._vocab_size, min(self.max_model_len, config.max_num_batched_tokens)
        )
        self._cache = KVCache(shape, num_blocks, cpu_blocks, self.device, scales)
        generation = generation_config(loaded, config.generation_config)
        self.sampling_defaults = sampling_defaults(generation, config.generation_config)
        eos_token_ids = ending_token_ids(loaded.config, generation, self.tokenizer, self._num_samplable)
        self._scheduler = Scheduler(
            self._blocks,
            config.max_num_seqs,
            config.max_num_batched_tokens,
            self.max_model_len,
            Preemption(config.preemption_mode, self._rates),
            eos_token_ids,
            config.enable_prefix_caching,
            config.scheduling_policy == "priority",
            config.memory_policy,
            config.batching == "static",
            self._runner.window,
        )
        self._sampler = Sampler(eos_token_ids)
        if config.preemption_mode == "auto" and cpu_blocks:
            self._measure_link(min(16, num_blocks, cpu_blocks))
        self._processor = OutputProcessor(self.tokenizer, self._scheduler)
        self._groups: dict[str, SequenceGroup] = {}
        self._seeds = random.Random(config.seed)
        self._arrivals = 0
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self.failed_requests: tuple[str, ...] | None = None  # see `step`
        self._failed_step = FailedStep()
        self._num_failed_steps = 0
        self._unmeasured = 0  # tokens of the steps since the last measurement
        self._measured_from = 0.0

    def add_request(
        self, request_id: str, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0
    ) -> None:
        """Queue a request.

        Args:
            request_id: a name no unfinished request has.
            prompt: text, or ``{"prompt_token_ids": [...]}``, or ``{"prompt": text}``. With a ``"cache_salt"``
                beside it the request shares blocks with those of the same salt only, so that nobody else can
                tell from its speed what was asked before.
            params: how to sample; None: as `default_sampling_params` says.
            priority: where the scheduling policy is "priority", lower ones run first.

        Raises:
            ValueError: the request is malformed or could never run. Nothing else is affected.
        """
        params = self.default_sampling_params() if params is None else params
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params must be SamplingParams, got {params!r}")
        if request_id in self._groups:
            raise ValueError(f"request_id {request_id!r} is already running")
        if not is_integer(priority):
            raise ValueError(f"priority must be an integer, got {priority!r}")
        if priority and self.config.scheduling_policy != "priority":
            raise ValueError(
                f"priority is {priority}, and requests run in the order of their arrival: leave it out, or "
                "set scheduling_policy='priority'"
            )
        params.check_vocabulary(self._num_samplable)
        self._sampler.check(params, self._num_samplable)
        given = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
        if isinstance(given, Sized) and len(given) > self.max_model_len:  # millions take seconds to look at
            raise ValueError(
                f"the prompt has {len(given)} tokens, and a sequence may have {self.max_model_len} "
                "(max_model_len): shorten the prompt"
            )
        text, token_ids = self._tokenize(prompt)
        if params.needs_whole_prompt and (beyond := max(token_ids)) >= self._num_samplable:
            raise ValueError(
                f"prompt_logprobs is asked for, and the model gives token {beyond} of the prompt no "
                "probability: leave it out"
            )
        available = self.max_model_len - len(token_ids)
        max_tokens = available if params.max_tokens is None else min(params.max_tokens, available)
        if params.only_prompt:
            max_tokens = 1  # the last step of a prompt samples; that token is not shown, and never an input
        words = bad_words.tokenize(
            self.tokenizer,
            [word for word in params.bad_words if len(word.lstrip()) <= max_tokens * self._longest_token],
            max_tokens,
        )
        group = SequenceGroup(
            request_id,
            text,
            token_ids,
            params,
            max_tokens,
            self._arrivals,
            priority=priority,
            cache_salt=_cache_salt(prompt),
            skip_reading_prefix_cache=params.needs_whole_prompt,
            # One with a token that the model cannot sample is never complete.
            bad_words=tuple(word for word in words if max(word) < self._num_samplable),
        )
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(64)
        self._scheduler.add(group, seed % 2**64)
        self._groups[request_id] = group
        self._arrivals += 1
        self._prompt_tokens += len(token_ids)

    def default_sampling_params(self) -> SamplingParams:
        """Return the settings of a request that brings none: those of the model's generation config."""
        return SamplingParams(**self.sampling_defaults)

    def abort(self, request_id: str) -> None:
        """End a request and free its blocks; an unknown or finished one is no error."""
        group = self._groups.pop(request_id, None)
        if group is not None:
            self._scheduler.abort(group)
            self._forget(group)

    def add_prefix(self, prefix_id: str, prompt: Prompt) -> None:
        """Keep the beginning of prompts in memory, used or not, until `remove_prefix`.

        It is computed in the next steps, as a request would be, and requests that begin with it use its
        blocks. Only full blocks are kept.

        Args:
            prefix_id: a name no other prefix has.
            prompt: as of a request; its ``"cache_salt"`` has to be that of the requests.

        Raises:
            ValueError: there is not one full block, the prompt is malformed, the prefix cache is off, or the
                memory that is left would be too small for the requests there are.
        """
        if not self.config.enable_prefix_caching or self.config.memory_policy != "paged":
            raise ValueError(
                "add_prefix needs the prefix cache: set enable_prefix_caching=True and memory_policy='paged'"
            )
        if prefix_id in self._scheduler.pinned.groups:
            raise ValueError(f"prefix_id {prefix_id!r} is taken: remove that prefix, or choose another id")
        text, token_ids = self._tokenize(prompt)
        size = self.config.block_size
        kept = token_ids[: len(token_ids) // size * size]
        if not kept:
            raise ValueError(
                f"the prefix has {len(token_ids)} tokens, and only full blocks of {size} tokens are kept"
            )
        group = SequenceGroup(
            prefix_id, text, kept, SamplingParams(), 1, self._arrivals, cache_salt=_cache_salt(prompt)
        )
        self._scheduler.add_prefix(group)
        self._arrivals += 1

    def remove_prefix(self, prefix_id: str) -> None:
        """Let go of a prefix: its blocks are found until their memory is needed.

        Raises:
            ValueError: there is none of this name.
        """
        if prefix_id not in self._scheduler.pinned.groups:
            raise ValueError(f"prefix_id {prefix_id!r}: there is no such prefix")
        self._scheduler.remove_prefix(prefix_id)

    @property
    def request_ids(self) -> list[str]:
        """Of the requests that have not finished."""
        return list(self._groups)

    def has_unfinished(self) -> bool:
        """Whether there is something to run: requests, or prefixes to be computed."""
        return self._scheduler.has_unfinished()

    def step(self) -> list[RequestOutput]:
        """Run one step.

        Returns:
            The outputs so far of every request that got a token.

        After an error of the model or the sampler every request can go on, and keeps what it has computed.
        ``failed_requests`` has the ids of those that were in the step, of prefixes as well; the next steps
        run them again before anything else: several by halves, so that those which fail are found and the
        others go on, one alone. It is None otherwise, also after errors that leave the engine wrong about
        itself.
        """
        self.failed_requests = None
        part = self._failed_step.next()
        plan = Plan(part) if part else self._scheduler.schedule()
        if not plan.scheduled:
            if self.has_unfinished():
                raise RuntimeError("requests are waiting and the scheduler ran none; please report this")
            return []
        if not self._unmeasured:
            self._measured_from = time.perf_counter()
        try:
            self._move_blocks(plan)
        except BaseException:
            self._step_failed(plan)
            self._scheduler.moves_failed()
            raise
        try:
            logits = self._runner.run(plan.scheduled, self._blocks, self._cache)
            samples = self._sampler.sample(logits, plan.scheduled)
        except BaseException:
            self._step_failed(plan)
            self._failed_step.add(self._scheduler.hold(plan.scheduled))
            raise
        self._measure(plan)
        self._scheduler.update(plan, samples.token_ids, samples.candidates)
        self._generation_tokens += sum(map(len, samples.token_ids)) + len(samples.candidates)
        outputs = self._processor.process(plan.scheduled, samples)
        for output in outputs:
            if output.finished:
                self._forget(self._groups.pop(output.request_id))
        if self.config.check_integrity:
            self.check_integrity()
        return outputs

    def _step_failed(self, plan: Plan) -> None:
        self._unmeasured = 0
        self._num_failed_steps += 1
        groups = dict.fromkeys(item.group for item in plan.scheduled)
        self.failed_requests = tuple(group.request_id for group in groups)

    def probe(self) -> None:
        """Compute and sample a token in a cache of its own, beside whatever requests there are. An error
        means that the engine itself does not work."""
        shape = self._runner.kv_shape(self.config.block_size)
        dry_run(self._runner, shape, [[0]], params=SamplingParams(temperature=0))

    def warm_up(self) -> None:
        """Run a small request and move blocks, so that what is compiled at its first use delays no real one.

        To be called before there are requests. The totals of `stats` are as before.
        """
        gpu, cpu = self._blocks.gpu, self._blocks.cpu
        self._cache.move_blocks(
            Plan(
                swap_out=((0, 0),) if cpu.num_blocks else (),
                swap_in=((0, 0),) if cpu.num_blocks else (),
                copies=((0, 1),) if gpu.num_blocks > 1 else (),  # as a fork does when it writes
            )
        )
        scheduler = self._scheduler
        totals = self._prompt_tokens, self._generation_tokens, scheduler.num_prefix_queries
        params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, seed=0)
        self.add_request("warm-up", {"prompt_token_ids": [0] * min(2, self.max_model_len - 1)}, params)
        while self.has_unfinished():
            self.step()
        self._prompt_tokens, self._generation_tokens, scheduler.num_prefix_queries = totals

    def stats(self) -> EngineStats:
        scheduler, gpu, cpu = self._scheduler, self._blocks.gpu, self._blocks.cpu
        swapped = sum(group.status is Status.SWAPPED for group in scheduler.preempted)
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting) + len(scheduler.preempted) - swapped,
            num_swapped=swapped,
            gpu_cache_usage=1 - gpu.num_free / gpu.num_blocks,
            cpu_cache_usage=1 - cpu.num_free / cpu.num_blocks if cpu.num_blocks else 0.0,
            num_preemptions=scheduler.num_preemptions,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            prefix_cache_queries=scheduler.num_prefix_queries,
            prefix_cache_hits=scheduler.num_prefix_hits,
            num_failed_steps=self._num_failed_steps,
        )

    def check_integrity(self) -> None:
        """Verify the block manager's books, and that without requests every block is free but those of
        pinned prefixes.

        Raises:
            RuntimeError: they are wrong.
        """
        self._blocks.check_integrity()
        gpu, cpu = self._blocks.gpu, self._blocks.cpu
        if self._scheduler.has_unfinished():
            return
        if gpu.num_blocks - gpu.num_free != self._scheduler.num_pinned_blocks():
            raise RuntimeError("no request is left, and blocks are not free")
        if cpu.num_free != cpu.num_blocks:
            raise RuntimeError("no request is left, and blocks of the swap space are not free")

    def _move_blocks(self, plan: Plan) -> None:
        if self.config.preemption_mode != "auto" or not (plan.swap_out or plan.swap_in):
            self._cache.move_blocks(plan)
            return
        self._synchronize()
        start = time.perf_counter()
        self._cache.move_blocks(plan)
        self._synchronize()
        self._rates.moved(len(plan.swap_out) + len(plan.swap_in), time.perf_counter() - start)

    def _measure_link(self, num_blocks: int) -> None:
        """Before the first request: the blocks hold nothing yet."""
        pairs = tuple((block, block) for block in range(num_blocks))
        for _ in range(3):  # the first may compile
            self._move_blocks(Plan(swap_out=pairs))
            self._move_blocks(Plan(swap_in=pairs))

    def _measure(self, plan: Plan) -> None:
        """How fast prompts are computed: over whole steps, from one that was waited for to the next."""
        if self.config.preemption_mode != "auto":
            return
        self._unmeasured += sum(item.num_tokens for item in plan.scheduled)
        if any(item.num_samples for item in plan.scheduled):  # somebody has read the step's tokens
            if self._unmeasured > 2 * len(plan.scheduled):  # mostly prompts
                self._rates.computed(self._unmeasured, time.perf_counter() - self._measured_from)
            self._unmeasured = 0

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _forget(self, group: SequenceGroup) -> None:
        self._sampler.release(group)
        self._processor.forget(group)

    def _tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        text: str | None
        given: Iterable[Any]
        if isinstance(prompt, str):
            text, given = prompt, tokenize(self.tokenizer, prompt, self.max_model_len, self.max_characters)
        elif isinstance(prompt, dict) and isinstance(prompt.get("prompt_token_ids"), Iterable):
            text, given = prompt.get("prompt"), prompt["prompt_token_ids"]
        elif isinstance(prompt, dict) and isinstance(prompt.get("prompt"), str):
            return self._tokenize(prompt["prompt"])
        else:
            raise ValueError(f"prompt must be a string or {{'prompt_token_ids': [...]}}, got {prompt!r}")
        token_ids = []
        for token in given:
            if not isinstance(token, Integral) or not 0 <= int(token) < self._vocab_size:
                made = ", which the tokenizer makes of the text" if isinstance(prompt, str) else ""
                raise ValueError(
                    f"prompt_token_ids must be integers from 0 to {self._vocab_size - 1}, got {token!r}{made}"
                )
            token_ids.append(int(token))
        if not token_ids:
            raise ValueError("prompt must have at least one token, got none")
        return text, token_ids


def tokenize(
    tokenizer: PreTrainedTokenizerBase, prompt: str, max_model_len: int, max_characters: int
) -> list[int]:
    """Return the tokens of a prompt.

    Args:
        max_model_len: the engine's, for the message.
        max_characters: longer texts have more tokens than that; it takes seconds to count those of megabytes.

    Raises:
        ValueError: the text is too long, or the tokenizer refuses it.
    """
    if len(prompt) > max_characters:
        raise ValueError(
            f"the prompt has {len(prompt)} characters, and {max_model_len} tokens (max_model_len) have at "
            f"most {max_characters}: shorten the prompt"
        )
    try:
        return tokenizer(prompt)["input_ids"]
    except (TypeError, UnicodeError) as error:  # half of a surrogate pair, which JSON can carry
        raise ValueError(f"prompt: the tokenizer refuses this text: {error}") from error


def _cache_salt(prompt: Prompt) -> str | None:
    salt = prompt.get("cache_salt") if isinstance(prompt, dict) else None
    if salt is not None and (not isinstance(salt, str) or not salt):
        raise ValueError(f"cache_salt must be a string that is not empty, got {salt!r}")
    return salt
