"""The engine: add requests, run one step at a time, get their outputs."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike, fspath

from cupaged.device import choose_device

from .config import EngineConfig
from .distributed.launch import RankGroup
from .distributed.lead import Lead
from .distributed.ranks import RankError
from .launched_step import LaunchedStep
from .memory.block_manager import BlockManager
from .memory.layer_groups import ONE_GROUP, LayerGroup, ReadWindow
from .model import demo_model
from .model.dry_run import probe
from .model.generation_config import ending_token_ids, generation_config, sampling_defaults
from .model.model_files import check_generation_config
from .model.step_timer import StepTimer
from .model.worker import Worker
from .output_processor import OutputProcessor
from .outputs import EngineStats, RequestOutput, Totals
from .prompts import Prompt, PromptReader
from .request_reader import RequestReader
from .sampling.grammar import Grammar, GrammarCompiler
from .sampling.sampler import Sampler
from .sampling_params import SamplingParams
from .scheduling.block_watch import BlockWatch
from .scheduling.failed_step import FailedStep
from .scheduling.overlap import Overlap
from .scheduling.preemption import Preemption, Rates
from .scheduling.request import SequenceGroup, Status
from .scheduling.scheduler import Scheduler
from .scheduling.step_plan import Plan


class LLMEngine:
    """Run requests over one model. Not thread-safe: one thread adds, steps and aborts.

    Args:
        model: a Hugging Face directory, a hub id, a GGUF file, or None for the demo model.
        config: settings.
        group: the ranks of ``tensor_parallel_size``, to be used by several engines in turn; None: they are
            started, and end with the engine.

    Raises:
        ValueError: the model or a setting cannot be served.
        RuntimeError: there is a GPU that cannot be used as things are installed; the message says what is
            missing.
    """

    def __init__(
        self,
        model: str | PathLike[str] | None = None,
        config: EngineConfig | None = None,
        group: RankGroup | None = None,
    ) -> None:
        self.config = config = config or EngineConfig()
        check_generation_config(config.generation_config)
        self.device, _ = choose_device(config.device)  # what is missing is said before a model is loaded
        path = None if model is None else fspath(model)
        self.model_name = path or demo_model.NAME
        self.ranks = None if config.tensor_parallel_size == 1 else Lead(path, config, self.device, group)
        worker = self.ranks.worker if self.ranks else Worker(path, config, self.device)
        self.device, self.dtype, self.tokenizer = worker.device, worker.model.dtype, worker.tokenizer
        self._runner, self._vocabulary, self._cache = worker.runner, worker.vocabulary, worker.cache
        shape, size = worker.shape, worker.size
        self.max_model_len = size.max_model_len
        self._prompts = PromptReader(self.tokenizer, self._vocabulary.size, self.max_model_len)
        self._blocks = BlockManager(
            size.num_gpu_blocks,
            size.num_cpu_blocks,
            config.block_size,
            config.eviction_policy,
            layer_groups=self._layer_groups(),
            max_step_tokens=config.max_num_batched_tokens,
        )
        self._rates = Rates(shape.block_bytes)
        self._preemption = Preemption(config.preemption_mode, self._rates)
        self._timer = StepTimer(self._cache, self._rates, enabled=self._preemption.reads_rates)
        self._timer.measure_link(min(16, size.num_gpu_blocks, size.num_cpu_blocks))
        generation = generation_config(worker.model, config.generation_config)
        self.sampling_defaults = sampling_defaults(generation, config.generation_config)
        self._make_scheduler_and_sampler(
            ending_token_ids(worker.model.config, generation, self.tokenizer, self._vocabulary.num_samplable)
        )
        self._groups: dict[str, SequenceGroup] = {}
        self._seeds = random.Random(config.seed)
        self._totals = Totals()
        self._launched: deque[LaunchedStep] = deque()
        self._overlap = Overlap(config.async_scheduling, default=self.device.type == "cuda")
        self.failed_requests: tuple[str, ...] | None = None  # see `step`
        self._failed_step = FailedStep()

    def _layer_groups(self) -> Sequence[LayerGroup]:
        """Return what the layers read of their memory, which is the same for all of them."""
        window = self._runner.window
        if window is None or self.config.memory_policy != "paged":
            return ONE_GROUP
        return [LayerGroup("window", ReadWindow(window))]

    def _make_scheduler_and_sampler(self, eos_token_ids: frozenset[int]) -> None:
        self._scheduler = Scheduler(
            self.config,
            blocks=self._blocks,
            preemption=self._preemption,
            max_model_len=self.max_model_len,
            eos_token_ids=eos_token_ids,
        )
        self._sampler = Sampler(eos_token_ids)
        self.grammars = GrammarCompiler(self.tokenizer, self._vocabulary.num_samplable, eos_token_ids)
        self._processor = OutputProcessor(self.tokenizer, self._scheduler)
        self._requests = RequestReader(
            self.tokenizer,
            self._prompts,
            self._sampler,
            self._vocabulary.num_samplable,
            self.max_model_len,
            by_priority=self._scheduler.reads_priority,
        )

    @property
    def max_characters(self) -> int:
        """Return the maximum number of characters of a prompt; longer ones have too many tokens."""
        return self._prompts.max_characters

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        grammar: Grammar | None = None,
    ) -> None:
        """Queue a request.

        Args:
            request_id: an ID that no unfinished request has.
            prompt: text, or ``{"prompt_token_ids": [...]}``, or ``{"prompt": text}``. With a ``"cache_salt"``
                beside it the request shares blocks with those of the same salt only, so that nobody else can
                tell from its speed what was asked before.
            params: how to sample; None: as `default_sampling_params` says.
            priority: where the scheduling policy is "priority", lower ones run first.
            grammar: what ``grammars.compile`` returned for ``params.structured_outputs`` in another thread.

        Raises:
            ValueError: the request is malformed or could never run. Nothing else is affected.
        """
        params = self.default_sampling_params() if params is None else params
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params must be SamplingParams, got {params!r}")
        if request_id in self._groups:
            raise ValueError(f"request_id {request_id!r} is already running")
        group = self._requests.read(request_id, prompt, params, priority, self._totals.arrivals)
        if params.structured_outputs is not None and grammar is None:
            grammar = self.grammars.compile(params.structured_outputs)
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(64)
        self._scheduler.add(group, seed % 2**64)
        if grammar is not None:
            self._sampler.add_grammar(group, grammar)
        self._groups[request_id] = group
        self._totals.arrivals += 1
        self._totals.prompt_tokens += group.prompt_len

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
            prefix_id: an ID that no other prefix has.
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
        group = self._requests.read_prefix(prefix_id, prompt, self.config.block_size, self._totals.arrivals)
        self._scheduler.add_prefix(group)
        self._totals.arrivals += 1

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
        """Return the IDs of unfinished requests."""
        return list(self._groups)

    def has_unfinished(self) -> bool:
        """Return whether there is something to run or to return: requests, prefixes, launched steps."""
        return bool(self._launched) or self._scheduler.has_unfinished()

    def step(self) -> list[RequestOutput]:
        """Return the outputs of the next step: schedule, launch, resolve.

        With ``async_scheduling`` the step after it is scheduled and launched first, as long as nothing needs
        the tokens of this one for that (`Overlap`). At most two steps are launched and not resolved.

        Returns:
            The outputs so far of every request that got a token.

        After an error of the model or the sampler every request can go on, and keeps what it has computed.
        ``failed_requests`` has the ids of those that were in the step, of prefixes as well; the next steps
        run them again before anything else: several by halves, so that those which fail are found and the
        others go on, one alone. It is None otherwise, also after errors that leave the engine wrong about
        itself.
        """
        self.failed_requests = None
        while self._may_launch() and (plan := self._schedule()).scheduled:
            self._launched.append(self._launch(plan))
        if not self._launched:
            return []
        outputs = self._resolve(self._launched[0])
        if self.config.check_integrity:
            self.check_integrity()
        return outputs

    def _may_launch(self) -> bool:
        """Return whether the next step can be scheduled now."""
        if not self._launched:
            return True
        last = self._launched[-1]
        if len(self._launched) == 2 or last.error is not None or self._failed_step:
            return False
        return self._overlap.reason_to_wait(last.plan) is None

    def _schedule(self) -> Plan:
        part = self._failed_step.next()
        plan = Plan(part) if part else self._scheduler.schedule()
        if not plan.scheduled and self._scheduler.has_unfinished():
            raise RuntimeError("requests are waiting and the scheduler ran none; please report this")
        return plan

    def _launch(self, plan: Plan) -> LaunchedStep:
        """Hand a step to the device, or keep the error for when the steps before are resolved."""
        self._timer.start_step()
        moved = False
        try:
            self._timer.move_blocks(plan)
            moved = True
            sampled = self._launched[-1].sampled if self._launched else None
            logits = self._runner.run(plan.scheduled, self._blocks, self._cache, sampled)
            samples = self._sampler.launch(logits, plan.scheduled, sampled)
        except RankError:
            raise
        except BaseException as error:
            self._timer.step_failed()
            self._totals.failed_steps += 1
            if moved:
                self._failed_step.add(self._scheduler.hold(plan.scheduled))
            else:
                self._scheduler.moves_failed()
            if not isinstance(error, Exception):  # such as Ctrl-C
                raise
            return LaunchedStep(plan, error=error)
        self._scheduler.advance(plan)
        return LaunchedStep(plan, samples)

    def _resolve(self, step: LaunchedStep) -> list[RequestOutput]:
        """Wait for the samples of a step, end the sequences that they end and build the outputs."""
        if step.samples is None:
            assert step.error is not None
            self._launched.popleft()
            self.failed_requests = step.request_ids
            try:
                raise step.error
            finally:
                del step  # or the error's traceback would keep the error, and with it the step's tensors
        samples = step.samples.result()
        self._launched.popleft()
        plan = step.plan
        self._timer.end_step(plan, idle=not self._launched)
        wasted = self._scheduler.resolve(plan, samples.token_ids, samples.candidates)
        if wasted:
            samples.drop(plan.scheduled.index(item) for item in wasted)
        if not self._launched:  # a step with grammars is resolved before another is launched
            self._sampler.prepare()
        self._totals.generation_tokens += sum(map(len, samples.token_ids)) + len(samples.candidates)
        outputs = self._processor.process(plan.scheduled, samples)
        for output in outputs:
            if output.finished:
                self._forget(self._groups.pop(output.request_id))
        return outputs

    def probe(self) -> None:
        """Compute and sample a token in a cache of its own, beside any requests.

        An error means that the engine itself does not work.
        """
        probe(self._runner, self.config.block_size, SamplingParams(temperature=0))

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
        self.grammars.prepare()
        totals, queries = replace(self._totals), self._scheduler.num_prefix_queries
        params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, seed=0)
        self.add_request("warm-up", {"prompt_token_ids": [0] * min(2, self.max_model_len - 1)}, params)
        while self.has_unfinished():
            self.step()
        self._totals, self._scheduler.num_prefix_queries = totals, queries

    def stats(self) -> EngineStats:
        """Return the load and the counts so far."""
        scheduler, gpu, cpu = self._scheduler, self._blocks.gpu, self._blocks.cpu
        swapped = sum(group.status is Status.SWAPPED for group in scheduler.preempted)
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting) + len(scheduler.preempted) - swapped,
            num_swapped=swapped,
            gpu_cache_usage=1 - gpu.num_free / gpu.num_blocks,
            cpu_cache_usage=1 - cpu.num_free / cpu.num_blocks if cpu.num_blocks else 0.0,
            num_preemptions=scheduler.num_preemptions,
            prompt_tokens=self._totals.prompt_tokens,
            generation_tokens=self._totals.generation_tokens,
            prefix_cache_queries=scheduler.num_prefix_queries,
            prefix_cache_hits=scheduler.num_prefix_hits,
            num_failed_steps=self._totals.failed_steps,
            num_gpu_blocks=gpu.num_blocks,
            num_cpu_blocks=cpu.num_blocks,
        )

    def watch_blocks(self) -> BlockWatch:
        """Start to report what happens to the blocks, until the watch is closed."""
        return BlockWatch(self._blocks, self._scheduler)

    def check_integrity(self) -> None:
        """Verify the reference counts, and that without requests only pinned prefixes hold blocks.

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

    def close(self) -> None:
        """End the other ranks, if the model is divided."""
        if self.ranks is not None:
            self.ranks.close()

    def _forget(self, group: SequenceGroup) -> None:
        self._sampler.release(group)
        self._processor.forget(group)
