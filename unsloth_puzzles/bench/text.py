"""English text that every Python ships with: the language reference, as `help()` shows it. It needs no network."""

from functools import cache
from pydoc_data.topics import topics


@cache
def paragraphs(min_characters: int = 100) -> tuple[str, ...]:
    """Paragraphs of at least `min_characters`, each on one line, in the order of their topics, without duplicates.

    Prose only: at least 85 % of the characters are letters and spaces, which little code, grammar or tables reach, and
    there is neither a prompt (>>>) nor a production (::=).
    """
    if min_characters < 1:
        raise ValueError(f"min_characters must be at least 1, got {min_characters}")
    found = {}
    for topic in sorted(topics):
        for block in topics[topic].split("\n\n"):
            text = " ".join(block.split())
            letters = sum(c.isalpha() or c == " " for c in text)
            code = ">>>" in text or "::=" in text
            if len(text) >= min_characters and letters >= 0.85 * len(text) and not code:
                found[text] = None
    return tuple(found)
