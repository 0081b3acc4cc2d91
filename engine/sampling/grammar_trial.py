"""Compile a grammar from the standard input and print why it cannot be: a script.

Intersections of regular expressions and multiples of large numbers take exponential time and memory, which
llguidance does not limit.
"""

from __future__ import annotations

import contextlib
import sys

import llguidance as ll

_CPU_SECONDS = 3
_MEMORY = 2 << 30  # bytes


class _Bytes:
    """The tokenizer of a byte a token."""

    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(256)), b"<eos>")
    special_token_ids = (eos_token_id,)

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def _limit() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # other systems: the caller limits the time
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    """Run the script."""
    _limit()
    source = sys.stdin.buffer.read().decode()
    tokenizer = ll.LLTokenizer(ll.TokenizerWrapper(_Bytes()))
    matcher = ll.LLMatcher(tokenizer, source, limits=ll.LLParserLimits(verbose_errors=False), log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()
    # In bytes, as a message may quote what this system's encoding has not.
    sys.stdout.buffer.write(matcher.get_error().encode())


if __name__ == "__main__":
    main()
