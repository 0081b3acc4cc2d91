"""Compile what outputs have to be into grammars, for a model's tokenizer. llguidance does the parsing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Collection
from collections.abc import Sequence as SequenceABC
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import llguidance as ll
import llguidance.hf
import numpy as np
from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax
from transformers import PreTrainedTokenizerBase

from ..structured_outputs import StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

_KEPT = 64  # number of compiled grammars that are kept
# A grammar's lexer keeps its states, up to 2 kB each, as long as the grammar is kept.
_LIMITS = ll.LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
_TRIAL = Path(__file__).with_name("grammar_trial.py")
_TRIAL_SECONDS = 30.0  # of wall-clock time; the trial limits its own CPU time
_GBNF_ESCAPE = re.compile(r"\\(?:(u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8})|.)", re.DOTALL)
_ANY_OBJECT = '{"type":"object"}'


class Matcher:
    """Follow one output through a grammar.

    Tokens that end the output are never part of it.
    """

    def __init__(self, matcher: ll.LLMatcher) -> None:
        self.raw = matcher
        self.num_tokens = 0

    @property
    def error(self) -> str | None:
        """Return why the output cannot be followed any more; None if it can."""
        return self.raw.get_error() if self.raw.is_error() else None

    @property
    def may_end(self) -> bool:
        """Return whether the tokens so far are a complete output."""
        return self.raw.is_accepting()

    def copy(self) -> Matcher:
        """Return a matcher that is where this one is."""
        other = Matcher(self.raw.deep_copy())
        other.num_tokens = self.num_tokens
        return other

    def advance(self, token_ids: SequenceABC[int]) -> None:
        """Append tokens; one that the grammar does not permit is an `error`."""
        self.raw.consume_tokens(list(token_ids))
        self.num_tokens += len(token_ids)

    def rollback(self, num_tokens: int) -> None:
        """Take back the last tokens, of drafts that were not accepted."""
        if num_tokens > self.num_tokens:
            raise ValueError(f"num_tokens must be at most {self.num_tokens}, got {num_tokens}")
        self.raw.rollback(num_tokens)
        self.num_tokens -= num_tokens

    def num_permitted(self, token_ids: SequenceABC[int]) -> int:
        """Return how many of the first of several draft tokens may follow, without appending them."""
        return self.raw.validate_tokens(list(token_ids))

    def forced_tokens(self) -> list[int]:
        """Return the next tokens where there is no choice; none where there is."""
        return self.raw.compute_ff_tokens()


class Grammar:
    """Hold a compiled grammar, which any number of outputs share.

    Args:
        start: a matcher that has no token yet. It shares what it learns of the grammar with its copies.
        first_mask: int32 ``[words]``, the tokens that may come first, a bit each.
    """

    def __init__(self, start: Matcher, first_mask: np.ndarray) -> None:
        self._start = start
        self.first_mask = first_mask

    def matcher(self) -> Matcher:
        """Return a matcher for a new output."""
        return self._start.copy()


class GrammarCompiler:
    """Compile grammars for a tokenizer and keep those that were used last. Thread-safe.

    Args:
        tokenizer: the model's tokenizer.
        num_samplable: number of tokens that the model can sample.
        eos_token_ids: tokens that end an output.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, num_samplable: int, eos_token_ids: Collection[int]
    ) -> None:
        self._hf_tokenizer = tokenizer
        self._num_samplable = num_samplable
        self._eos_token_ids = sorted(eos_token_ids)
        self._lock = threading.Lock()
        self._compiled: OrderedDict[StructuredOutputsParams, Grammar] = OrderedDict()

    def compile(self, params: StructuredOutputsParams, *, trusted: bool = True) -> Grammar:
        """Return a grammar, compiled or from the last ones. llguidance lets other threads run meanwhile.

        Args:
            trusted: False: try it in a process of its own first, as a few lines can take llguidance hours and
                gigabytes.

        Raises:
            ValueError: it cannot be compiled, or the model cannot write it.
        """
        with self._lock:
            if params in self._compiled:
                self._compiled.move_to_end(params)
                return self._compiled[params]
        source = _source(params)
        if not trusted:
            _try(source, params.kind)
        grammar = self._compile(source, params.kind)
        with self._lock:
            self._compiled[params] = grammar
            while len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        return grammar

    def prepare(self) -> None:
        """Prepare the tokenizer, which holds up all threads for a second if its vocabulary is large."""
        with self._lock:
            self._tokenizer  # noqa: B018

    @cached_property
    def _tokenizer(self) -> ll.LLTokenizer:
        # More tokens than the tokenizer has are none of any text, so no grammar permits them.
        size = max(self._num_samplable, len(self._hf_tokenizer))
        eos = self._eos_token_ids or None  # None: the tokenizer's
        try:
            return llguidance.hf.from_tokenizer(self._hf_tokenizer, n_vocab=size, eos_token=eos)  # type: ignore[arg-type]
        except Exception as error:  # PanicException as well, which is not one
            raise ValueError(
                f"structured_outputs: llguidance cannot use the model's tokenizer: {error}"
            ) from error

    def _compile(self, source: str, kind: str) -> Grammar:
        self.prepare()
        matcher = Matcher(ll.LLMatcher(self._tokenizer, source, limits=_LIMITS, log_level=0))
        _check(matcher.error, kind)
        mask = np.zeros((self._tokenizer.vocab_size + 31) // 32, dtype=np.int32)
        matcher.raw.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        bits = np.unpackbits(mask.view(np.uint8), count=self._num_samplable, bitorder="little")
        _check(matcher.error or (None if bits.any() else "the model has no token to begin with"), kind)
        return Grammar(matcher, mask)


def _source(params: StructuredOutputsParams) -> str:
    """Return the grammar in llguidance's format.

    Raises:
        ValueError: GBNF has an error, or a text has half of a surrogate pair.
    """
    from_schema = ll.LLMatcher.grammar_from_json_schema
    options: JsonCompileOptions = {"whitespace_flexible": not params.disable_any_whitespace}
    if params.whitespace_pattern is not None:
        options["whitespace_pattern"] = params.whitespace_pattern
    try:
        match params.kind:
            case "json":
                return from_schema(str(params.json), defaults=options)
            case "json_object":
                return from_schema(_ANY_OBJECT, defaults=options)
            case "regex":
                return ll.LLMatcher.grammar_from_regex(str(params.regex))
            case "choice":
                choices = " | ".join(json.dumps(text, ensure_ascii=False) for text in params.choice or ())
                return ll.LLMatcher.grammar_from_lark(f"start: {choices}")
            case _:
                return ll.LLMatcher.grammar_from_lark(_lark(str(params.grammar)))
    except Exception as error:  # converters of grammars raise what they come across
        raise ValueError(_message(params.kind, str(error))) from error


def _lark(grammar: str) -> str:
    if is_lark_syntax(grammar):
        return grammar
    # llguidance's converter drops the zeros that some of these begin with, and Lark then misreads them.
    return gbnf_to_lark(_GBNF_ESCAPE.sub(_character, grammar))


def _character(escape: re.Match[str]) -> str:
    if escape[1] is None:  # another escape, as of a backslash
        return escape[0]
    code = int(escape[1].lstrip("uU"), 16)
    return f"\\x{code:02x}" if code < 128 else chr(code)


def _try(source: str, kind: str) -> None:
    """Compile a grammar in another process, which ends if that takes too long or too much memory.

    Raises:
        ValueError: it does, or the grammar has an error.
    """
    try:
        trial = subprocess.run(
            [sys.executable, "-I", str(_TRIAL)],
            input=source.encode(),
            capture_output=True,
            timeout=_TRIAL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        trial = None
    if trial is None or trial.returncode != 0:
        raise ValueError(_message(kind, "it takes too long, or too much memory: simplify it"))
    _check(trial.stdout.decode(errors="replace"), kind)


def _check(error: str | None, kind: str) -> None:
    if error:
        raise ValueError(_message(kind, error))


def _message(kind: str, reason: str) -> str:
    return f"structured_outputs: {kind} cannot be compiled: {reason.removesuffix('<non-verbose/>').strip()}"
