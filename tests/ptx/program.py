"""PTX, as NVRTC writes it, as a list of instructions. Only what the kernels in `cuda/` compile to."""

from __future__ import annotations

import ctypes
import re
import struct
from dataclasses import dataclass, field
from pathlib import PurePath

from cupaged.backends.cuda.arguments import OF_KERNEL

WIDTHS = {"pred": 1, "b8": 8, "u8": 8, "b16": 16, "u16": 16, "f16": 16, "b32": 32, "u32": 32, "s32": 32}
WIDTHS |= {"f32": 32, "f64": 64, "b64": 64, "u64": 64, "s64": 64}


@dataclass(frozen=True)
class Register:
    width: int  # in bits, 1 for a predicate
    index: int  # among those of its width


@dataclass(frozen=True)
class Special:
    """A register that is only read: "%tid.x"."""

    name: str


@dataclass(frozen=True)
class Immediate:
    value: int | float


@dataclass(frozen=True)
class Symbol:
    """The address of a variable in shared memory, or a label."""

    name: str


@dataclass(frozen=True)
class Address:
    """What is in brackets. A base of None: the offset is the address."""

    base: Register | Symbol | None
    offset: int


@dataclass(frozen=True)
class Vector:
    parts: tuple[Operand, ...]


@dataclass(frozen=True)
class Both:
    """A value and a predicate: what shfl.sync gives."""

    value: Operand
    predicate: Operand


Operand = Register | Special | Immediate | Symbol | Address | Vector | Both | None


@dataclass(frozen=True)
class Instruction:
    """One statement.

    Attributes:
        line: of the source, "common.cuh:12".
    """

    text: str
    line: str
    opcode: str  # with all its modifiers: "ld.global.nc.v4.u32"
    operands: tuple[Operand, ...]
    guard: Register | None = None
    negated: bool = False


@dataclass(frozen=True)
class Variable:
    """In shared memory. No size: what the launch gives."""

    alignment: int
    size: int | None


@dataclass
class Program:
    """An entry point.

    Attributes:
        labels: the index of the instruction after each.
        registers: how many there are of each width.
        param: the name of the parameter, a struct.
        fields: its fields' sizes in bytes, by offset.
    """

    entry: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[int, int] = field(default_factory=dict)
    param: str = ""
    fields: dict[int, int] = field(default_factory=dict)
    shared: dict[str, Variable] = field(default_factory=dict)


_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)".*$', re.MULTILINE)
_LINE = re.compile(r"\.loc\s+(\d+)\s+(\d+)[^\n]*\n")
_COMMENT = re.compile(r"//[^\n]*")
_ENTRY = re.compile(r"\.visible\s+\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{(.*)\}", re.DOTALL)
_PARAM = re.compile(r"\s*\.param\s+\.align\s+8\s+\.b8\s+(\w+)\[(\d+)\]\s*")
_SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.(\w+)\s+(\w+)(?:\[(\d*)\])?")
_LABEL = re.compile(r"([\w$]+):\s*")
_GUARD = re.compile(r"@(!?)(%?\w+)\s+(.*)", re.DOTALL)
_ADDRESS = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)


def parse(text: str) -> Program:
    """The one entry point of a module.

    Raises:
        ValueError: something is used that this does not know.
    """
    files = {int(number): PurePath(name).name for number, name in _FILE.findall(text)}
    text = _FILE.sub("", _COMMENT.sub("", text)).partition(".section")[0]
    found = _ENTRY.search(text)
    if found is None:
        raise ValueError("no entry point")
    program = Program(found[1])
    arguments, param = OF_KERNEL[found[1]], _PARAM.fullmatch(found[2])
    if param is None or int(param[2]) != ctypes.sizeof(arguments):
        raise ValueError(f"{found[1]} takes {found[2].strip()}, not the {arguments.__name__}")
    program.param = param[1]
    for name, _ in arguments._fields_:
        place = getattr(arguments, name)
        program.fields[place.offset] = place.size
    for alignment, kind, name, count in _SHARED.findall(text):
        size = WIDTHS[kind] // 8 * int(count) if count else None
        if not count and f"{name}[" not in text:
            size = WIDTHS[kind] // 8
        program.shared[name] = Variable(int(alignment), size)
    _Body(program, files).read(found[4])
    return program


Scopes = list[dict[str, Register | str]]  # names, and the inner ones last


class _Body:
    """Registers and labels are known in the braces they are declared in."""

    def __init__(self, program: Program, files: dict[int, str]) -> None:
        self._program, self._files = program, files
        self._line = ""
        self._scopes: Scopes = [{}]
        self._pending: list[tuple[int, Scopes]] = []

    def read(self, body: str) -> None:
        position = 0
        while position < len(body):
            if body[position].isspace() or body[position] == ";":
                position += 1
            elif body[position] == "{":
                self._scopes.append({})
                position += 1
            elif body[position] == "}":
                self._scopes.pop()
                position += 1
            elif (place := _LINE.match(body, position)) is not None:
                self._line = f"{self._files[int(place[1])]}:{place[2]}"
                position = place.end()
            elif (label := _LABEL.match(body, position)) is not None:
                self._label(label[1])
                position = label.end()
            else:
                end = body.index(";", position)
                self._statement(body[position:end].strip())
                position = end + 1
        # A label may come after the branch to it.
        for index, scopes in self._pending:
            statement = self._program.instructions[index]
            self._program.instructions[index] = _instruction(statement.text, statement.line, scopes)

    def _label(self, name: str) -> None:
        unique = name if len(self._scopes) == 1 else f"{name}@{len(self._program.instructions)}"
        self._scopes[-1][name] = unique
        self._program.labels[unique] = len(self._program.instructions)

    def _statement(self, text: str) -> None:
        if (declared := _REGISTERS.match(text)) is not None:
            self._declare(WIDTHS[declared[1]], declared[2])
        elif text.startswith(".pragma") or _SHARED.search(text):
            pass
        elif text.startswith("."):
            raise ValueError(f"unknown directive: {text}")
        else:
            self._pending.append((len(self._program.instructions), list(self._scopes)))
            self._program.instructions.append(Instruction(text, self._line, "", ()))

    def _declare(self, width: int, names: str) -> None:
        for name in names.split(","):
            stem, _, count = name.strip().rstrip(">").partition("<")
            for full in [f"{stem}{i}" for i in range(int(count))] if count else [stem]:
                index = self._program.registers.get(width, 0)
                self._program.registers[width] = index + 1
                self._scopes[-1][full] = Register(width, index)


def _instruction(text: str, line: str, scopes: Scopes) -> Instruction:
    guard, negated, rest = None, False, text
    if (guarded := _GUARD.match(text)) is not None:
        negated, rest = guarded[1] == "!", guarded[3]
        named = _look_up(guarded[2], scopes)
        if not isinstance(named, Register):
            raise ValueError(f"unknown guard: {text}")
        guard = named
    opcode, *operands = rest.split(maxsplit=1)
    return Instruction(text, line, opcode, _operands("".join(operands), scopes), guard, negated)


def _look_up(name: str, scopes: Scopes) -> Operand:
    for scope in reversed(scopes):
        if name in scope:
            found = scope[name]
            return found if isinstance(found, Register) else Symbol(found)
    return Symbol(name)


def _operands(text: str, scopes: Scopes) -> tuple[Operand, ...]:
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    return tuple(_operand(part.strip(), scopes) for part in parts if part.strip())


def _operand(text: str, scopes: Scopes) -> Operand:
    if text == "_":
        return None
    if text.startswith("{"):
        return Vector(_operands(text[1:-1], scopes))
    if "|" in text:
        value, predicate = (_operand(part.strip(), scopes) for part in text.split("|"))
        return Both(value, predicate)
    if (address := _ADDRESS.fullmatch(text)) is not None:
        base = _operand(address[1], scopes)
        offset = int(address[2] or 0)
        if isinstance(base, Immediate):
            return Address(None, int(base.value) + offset)
        if not isinstance(base, (Register, Symbol)):
            raise ValueError(f"unknown address: {text}")
        return Address(base, offset)
    if text.startswith(("0f", "0F")) and len(text) == 10:
        return Immediate(struct.unpack(">f", bytes.fromhex(text[2:]))[0])
    if text.startswith(("0d", "0D")) and len(text) == 18:
        return Immediate(struct.unpack(">d", bytes.fromhex(text[2:]))[0])
    if text[0].isdigit() or text[0] == "-":
        return Immediate(int(text.rstrip("U"), 0))
    found = _look_up(text, scopes)
    return Special(text) if isinstance(found, Symbol) and text.startswith("%") else found
