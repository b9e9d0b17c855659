"""A model whose answers a test writes."""

from collections.abc import Callable

from curate.models import Asked
from curate.page import Picture
from evaluate.judges import Unanswered


class Scripted:
    """Stands where a curate.models.Model does. answer(texts and pictures) -> words, or an Unanswered."""

    def __init__(self, answer: str | Callable[[Asked], str | Unanswered]):
        self.answer = answer if callable(answer) else lambda asked: answer
        self.asked: list[Asked] = []

    def write_all(self, questions: list[Asked], max_tokens: int = 0) -> list[str | Unanswered]:
        self.asked += questions
        return [self.answer(asked) for asked in questions]

    def write(self, asked: Asked, max_tokens: int = 0) -> str:
        answer = self.write_all([asked])[0]
        if isinstance(answer, Unanswered):
            raise answer
        return answer


def picture(name: str, data: bytes = b"", **fields) -> Picture:
    return Picture(f"https://example.org/{name}", **fields).filled(data or name.encode())
