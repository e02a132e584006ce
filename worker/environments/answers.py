"""The tag that an answer is given in, and the text between. The only place that knows how it is
written."""

BEGIN, END = "<answer>", "</answer>"
PLACEHOLDER = "your answer"
"""What the instruction has between the tags: quoted, it is not an answer."""


def tagged(answer: str) -> str:
    return f"{BEGIN}{answer}{END}"


def extract_answer(completion: str) -> str | None:
    """Return the text of the last answer tag, stripped; None without one, and for the instruction's
    own example."""
    head, closing, _ = completion.rpartition(END)
    _, opening, answer = head.rpartition(BEGIN)
    return answer.strip() if closing and opening and answer.strip() != PLACEHOLDER else None


def is_closed(completion: str) -> bool:
    """Return whether an answer was given, right or wrong."""
    return extract_answer(completion) is not None
