"""The tiny dialogues, answered by somebody else."""

from dataclasses import replace

from train.data.layout import Example, MQDialog


def answered_by(data: MQDialog, name: str) -> MQDialog:
    """``data`` with a responder of another name."""

    def recast(example: Example) -> Example:
        spoken = (name if turn.speaker == data.responder else turn.speaker for turn in example.turns)
        turns = (replace(turn, speaker=who) for turn, who in zip(example.turns, spoken, strict=True))
        return replace(example, responder=name, turns=tuple(turns))

    train, dev = ([recast(example) for example in half] for half in (data.train, data.dev))
    return replace(data, responder=name, train=train, dev=dev)
