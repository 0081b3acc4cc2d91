"""Define the server's settings of chats."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .reasoning import REASONING
from .tools.registry import PARSERS

AUTO, NONE = "auto", "none"  # names in place of a parser's


@dataclass(frozen=True)
class ChatSettings:
    """Hold the settings of chats, under vLLM's names.

    Args:
        chat_template: file with a chat template in place of the model's; or the template itself, in one line.
        trust_request_chat_template: accept a chat_template in requests; it is a program that runs here, in
            Jinja's sandbox, for up to ten seconds.
        tool_call_parser: format in which the model writes tool calls; auto: as the chat template tells, none:
            the model's own choice whether to call is not offered.
        enable_auto_tool_choice: accepted for vLLM's command lines; a model may always choose to call tools.
        reasoning_parser: format in which the model marks its reasoning, which is sent apart from the answer;
            auto: as the chat template tells, none: the reasoning is a part of the answer.

    Raises:
        ValueError: there is no such parser, or the template cannot be read.
    """

    chat_template: str | None = None
    trust_request_chat_template: bool = False
    tool_call_parser: str = AUTO
    enable_auto_tool_choice: bool = True
    reasoning_parser: str = AUTO

    def __post_init__(self) -> None:
        for name, parsers in (("tool_call_parser", PARSERS), ("reasoning_parser", REASONING)):
            value = getattr(self, name)
            if value not in (AUTO, NONE, *parsers):
                raise ValueError(f"{name} must be auto, none or one of {', '.join(parsers)}, got {value!r}")
        self.template()

    def template(self) -> str | None:
        """Return the text of the chat template, if there is one in place of the model's.

        Raises:
            ValueError: its file cannot be read.
        """
        if self.chat_template is None or "{%" in self.chat_template or "{{" in self.chat_template:
            return self.chat_template
        try:
            return Path(self.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise ValueError(
                f"chat_template must be a file with a template, or a template itself, got "
                f"{self.chat_template!r}: {why}"
            ) from None
