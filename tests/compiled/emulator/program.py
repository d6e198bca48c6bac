"""PTX text as a list of instructions.

Inline assembly may declare registers and labels inside braces; they get the block's number as a suffix.
"""

import re
from dataclasses import dataclass, field

_ENTRY = re.compile(r"\.entry (\w+)\((.*?)\)", re.DOTALL)
_STATEMENT = re.compile(
    r"(?:@(?P<negated>!?)(?P<guard>\S+)\s+)?(?P<opcode>\S+)\s*(?P<operands>.*)", re.DOTALL
)


@dataclass(frozen=True)
class Instruction:
    """One instruction: ``@guard opcode operands;``, operands as they are written."""

    opcode: str
    operands: tuple[str, ...]
    guard: str | None
    negated: bool
    line: int


@dataclass
class Program:
    """A kernel's code.

    Attributes:
        parameters: the type of each, ``"map"`` for a tensor map (128 bytes by value).
        threads: of a block.
        labels: the instruction that each label stands before.
    """

    name: str
    parameters: list[str]
    threads: int
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    @classmethod
    def parse(cls, ptx: str) -> "Program":
        """The one kernel of a module."""
        entry = _ENTRY.search(ptx)
        parameters = [_parameter_type(text) for text in entry.group(2).split(",") if text.strip()]
        threads = int(re.search(r"\.(?:reqntid|maxntid) (\d+)", ptx).group(1))
        program = cls(entry.group(1), parameters, threads)
        start = ptx.index("{", entry.end())
        program._read(ptx[start:], first_line=ptx[:start].count("\n") + 1)
        return program

    def _read(self, body: str, first_line: int) -> None:
        blocks, opened = [], 0
        for number, line in enumerate(body.splitlines(), first_line):
            text = line.split("//")[0].strip()
            while text and not text.startswith((".loc", ".file", ".pragma", ".section")):
                if text[0] == "{":
                    opened += 1
                    blocks.append((opened, set()))
                    text = text[1:].strip()
                elif text[0] == "}":
                    blocks.pop()
                    if not blocks:
                        return  # what follows is for debuggers
                    text = text[1:].strip()
                elif label := re.match(r"([\w$]+):\s*", text):
                    blocks[-1][1].add(label.group(1))
                    self.labels[_rename(label.group(1), blocks)] = len(self.instructions)
                    text = text[label.end() :]
                else:
                    statement, _, text = (part.strip() for part in text.partition(";"))
                    self._add(statement, blocks, number)

    def _add(self, statement: str, blocks: list, line: int) -> None:
        if statement.startswith(".reg"):
            blocks[-1][1].update(name.strip() for name in statement.split(maxsplit=2)[2].split(","))
            return
        match = _STATEMENT.match(_rename(statement, blocks))
        operands = tuple(_split(match["operands"]))
        guard, negated = match["guard"], match["negated"] == "!"
        self.instructions.append(Instruction(match["opcode"], operands, guard, negated, line))


def _parameter_type(text: str) -> str:
    return "map" if "[128]" in text else re.search(r"\.([busf]\d+)", text).group(1)


def _rename(text: str, blocks: list) -> str:
    """Names that an inner block has declared, with that block's number; the outermost keeps its names."""
    for number, names in reversed(blocks[1:]):
        local = [name for name in names if not name.startswith("%")]
        if local:
            text = re.sub(rf"(?<![\w$%])({'|'.join(map(re.escape, local))})(?![\w$])", rf"\1.{number}", text)
    return text


def _split(operands: str) -> list[str]:
    """At the commas outside brackets."""
    found, depth = [""], 0
    for character in operands:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            found.append("")
        else:
            found[-1] += character
    return [text.strip() for text in found if text.strip()]
