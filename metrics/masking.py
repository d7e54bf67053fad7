"""Options without secrets, for trackers that send them elsewhere.

No option is a token, but a value may hold one: a URL with a password, a path with a token in it.
"""

import dataclasses
import os
import re
from typing import Any

from config.options import Options

MASK = "***"
SECRET = (
    r"(?:token|secret|passwd|password|passphrase|credentials?|api[_-]?key|access[_-]?key|private[_-]?key|signature)"
)
# Each pattern keeps its first group and replaces the rest.
PATTERNS = [
    re.compile(r"(://)[^/\s@,]+(?=@)"),  # user and password of a URL
    re.compile(r"(://[^\s,?]*\?)[^\s,]+"),  # the query of a URL: signatures of S3, keys of a service
    re.compile(
        rf"(\b[\w-]*{SECRET}\b[\"']?\s*[=:]\s*[\"']?)[^\s,;&\"'/]+", re.IGNORECASE
    ),  # token=..., "api_key": "..."
    # Tokens of Hugging Face, OpenAI and others, GitHub, GitLab, AWS, Google, Slack, and JSON web tokens.
    re.compile(r"()\b(?:hf_|sk-|gh[opsu]_|github_pat_|glpat-|AKIA|ASIA|AIza|xox[abps]-)[\w-]{8,}"),
    re.compile(r"()\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*"),
]


def mask(text: str) -> str:
    """`text` with *** for each secret: by its form, or because a variable of the environment holds it as a secret."""
    for name, value in os.environ.items():
        if len(value) >= 8 and re.search(rf"{SECRET}|_KEY$|_PAT$", name, re.IGNORECASE):
            text = text.replace(value, MASK)
    for pattern in PATTERNS:
        text = pattern.sub(rf"\1{MASK}", text)
    return text


def masked_options(options: Options) -> dict[str, Any]:
    """Every option by name, with masked text."""
    values = dataclasses.asdict(options)
    return {name: mask(value) if isinstance(value, str) else value for name, value in values.items()}
