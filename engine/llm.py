"""Run prompts offline, in batches."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .beam_search import BeamSearchOutput, BeamSearchParams, BeamSearchSequence
from .chat_template import render, rendered_prompt
from .config import EngineConfig
from .llm_engine import LLMEngine
from .outputs import RequestOutput
from .prompts import Prompt
from .sampling_params import SamplingParams
from .server.messages import read_messages

Message = dict[str, Any]


class LLM:
    """Complete prompts in batches with one model.

    >>> llm = LLM()
    >>> llm.generate("The capital of France is", SamplingParams(temperature=0))[0].outputs[0].text

    `close`, or the end of ``with LLM(...) as llm:``, gives the memory back.

    Args:
        model: a Hugging Face directory, a hub ID, a GGUF file, or None for the demo model.
        **config: settings of `EngineConfig`.

    Raises:
        ValueError: `EngineConfig` or `LLMEngine` refuse the settings or the model.
    """

    def __init__(self, model: str | PathLike[str] | None = None, **config: Any) -> None:
        self._engine: LLMEngine | None = LLMEngine(model, EngineConfig.from_kwargs(config))
        self._summary = summary(self._engine)
        self._next_id = 0

    @property
    def engine(self) -> LLMEngine:
        """Return the engine.

        Raises:
            RuntimeError: `close` was called.
        """
        if self._engine is None:
            raise RuntimeError(f"{self!r} has given its memory back: create a new LLM")
        return self._engine

    def close(self) -> None:
        """Give the memory of the model and of the KV cache back. Later calls raise RuntimeError."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None
        release_memory()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"LLM({self._summary}{', closed' if self._engine is None else ''})"

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the default settings: those of the model's generation config, then of `SamplingParams`.

        With ``generation_config="vllm"`` they are those of `SamplingParams` alone.
        """
        return self.engine.default_sampling_params()

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the model's tokenizer."""
        return self.engine.tokenizer

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations, rendered by the model's chat template as the server does.

        The outputs are what the model writes: neither tool calls nor reasoning are read.

        Args:
            messages: messages of a conversation in OpenAI's format, or several conversations.
            sampling_params, use_tqdm, priority: as in `generate`.
            chat_template: a template in place of the model's.
            add_generation_prompt: end with the beginning of an assistant's message; by default unless the
                last message is continued.
            continue_final_message: let the model continue the last message.
            tools: functions that the model may call, in OpenAI's format.
            chat_template_kwargs: other variables of the template.

        Raises:
            ValueError: a message is malformed, the template refuses the conversation, or `generate` does.
        """
        single = bool(messages) and not isinstance(messages[0], (list, tuple))
        conversations = [messages] if single else messages
        prompts = []
        for position, conversation in enumerate(conversations):
            try:
                text = render(
                    self.engine.tokenizer,
                    read_messages(conversation),
                    max_characters=self.engine.max_characters,
                    tools=tools,
                    chat_template=chat_template,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    chat_template_kwargs=chat_template_kwargs,
                )
            except ValueError as error:
                raise error if single else ValueError(f"conversation {position}: {error}") from None
            prompts.append(rendered_prompt(text, self.engine.tokenizer))
        return self.generate(prompts, sampling_params, use_tqdm, priority)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete the prompts, running as many at once as memory allows.

        Args:
            prompts: one prompt or several: text or ``{"prompt_token_ids": [...]}``; see
                `LLMEngine.add_request` for more.
            sampling_params: settings for all prompts, or one for each; by default
                `get_default_sampling_params`.
            use_tqdm: show a progress bar.
            priority: a number for each prompt, if the scheduling policy is "priority": lower ones run first.

        Returns:
            The outputs in the order of the prompts.

        Raises:
            ValueError: a request is malformed or can never run, or the engine has other requests. No request
                is run then.
        """
        if unfinished := self.engine.request_ids:
            raise ValueError(
                f"the engine has other requests ({', '.join(unfinished[:3])}), whose outputs `generate` "
                "would lose: call `engine.step()` until they have finished, or abort them"
            )
        if isinstance(prompts, (str, dict)):
            prompts = [prompts]
        if not isinstance(prompts, Sequence):
            raise ValueError(f"prompts must be a prompt or a sequence of prompts, got {prompts!r}")
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params or self.get_default_sampling_params()] * len(prompts)
        if not isinstance(sampling_params, Sequence):
            raise ValueError(
                f"sampling_params must be SamplingParams, one or several, got {sampling_params!r}"
            )
        if len(sampling_params) != len(prompts):
            raise ValueError(
                f"sampling_params must be one, or one for each of the {len(prompts)} prompts, "
                f"got {len(sampling_params)}"
            )
        priority = [0] * len(prompts) if priority is None else priority
        if not isinstance(priority, Sequence) or len(priority) != len(prompts):
            raise ValueError(f"priority must be one for each of the {len(prompts)} prompts, got {priority!r}")
        ids: list[str] = []
        try:
            for position, (prompt, params, rank) in enumerate(zip(prompts, sampling_params, priority)):
                request_id = str(self._next_id)
                self._next_id += 1
                try:
                    self.engine.add_request(request_id, prompt, params, priority=rank)
                except ValueError as error:
                    raise ValueError(f"prompts[{position}]: {error}") from None
                ids.append(request_id)
            finished: dict[str, RequestOutput] = {}
            with tqdm(total=len(ids), desc="Requests", disable=not use_tqdm, dynamic_ncols=True) as bar:
                while len(finished) < len(ids):
                    for output in self.engine.step():
                        if output.finished:
                            finished[output.request_id] = output
                            bar.update()
        finally:  # after an error or Ctrl-C the engine must have no requests
            for request_id in ids:
                self.engine.abort(request_id)
        return [finished[request_id] for request_id in ids]

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, use_tqdm: bool = False
    ) -> list[BeamSearchOutput]:
        """Search the most likely outputs of the prompts.

        Args:
            prompts: as for `generate`.
            params: settings for all prompts.
            use_tqdm: show a progress bar.

        Returns:
            The ``beam_width`` best sequences of each prompt, the best first.

        Raises:
            ValueError: as for `generate`.
        """
        tokenizer, results = self.engine.tokenizer, []
        for output in self.generate(prompts, params.sampling_params(), use_tqdm):
            sequences = []
            for beam in output.outputs:
                tokens = [*output.prompt_token_ids, *beam.token_ids]
                text = tokenizer.decode(tokens)
                sequences.append(BeamSearchSequence.of(beam, tokens, text))  # type: ignore[arg-type]
            results.append(BeamSearchOutput(sequences))
        return results


def summary(engine: LLMEngine) -> str:
    """Return model, device, dtype and blocks of an engine, for `repr`."""
    stats = engine.stats()
    return (
        f"model={engine.model_name!r}, device={str(engine.device)!r}, "
        f"dtype={str(engine.dtype).removeprefix('torch.')!r}, "
        f"num_gpu_blocks={stats.num_gpu_blocks}, num_cpu_blocks={stats.num_cpu_blocks}, "
        f"block_size={engine.config.block_size}"
    )


def release_memory() -> None:
    """Give back the memory of objects that are not referred to any more, also to other processes."""
    gc.collect()  # models contain reference cycles
    torch.cuda.empty_cache()  # does nothing if CUDA is not in use
