"""Python without its comments: of them no result depends."""

import io
import tokenize


def without_comments(source: str) -> str:
    """`source`, its lines where they were, without comments; as it is if it is no Python (a notebook's magics)."""
    lines = source.split("\n")
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                row, column = token.start
                lines[row - 1] = lines[row - 1][:column].rstrip()
    except (tokenize.TokenError, SyntaxError):
        return source
    return "\n".join(lines)
