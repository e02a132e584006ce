"""Define the tags around an answer, and extract the text between them."""

BEGIN, END = "<answer>", "</answer>"
PLACEHOLDER = "your answer"
"""The text between the tags in the instruction; repeated by a model, it is not an answer."""


def tagged(answer: str) -> str:
    return f"{BEGIN}{answer}{END}"


def extract_answer(completion: str) -> str | None:
    """Return the text of the last answer tag, stripped.

    None if there is no tag, or if the text is the instruction's own example.
    """
    head, closing, _ = completion.rpartition(END)
    _, opening, answer = head.rpartition(BEGIN)
    return answer.strip() if closing and opening and answer.strip() != PLACEHOLDER else None


def is_closed(completion: str) -> bool:
    """Return whether the completion gives an answer, right or wrong."""
    return extract_answer(completion) is not None
