"""The page on error messages quotes the messages of the code."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Whose messages are not in our code.
OTHERS = re.compile(r"\((?:NumPy|Python|PyTorch|Detectron2)\)")


def texts() -> str:
    """All strings in the code, with "..." for inserted values."""
    found = []
    for path in [*(ROOT / "spar_d2").rglob("*.py"), *(ROOT / "tools").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def quoted() -> list[str]:
    """Messages in the first columns of the page's tables."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    cells = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
    return [quote for cell in cells if not OTHERS.search(cell) for quote in re.findall("`([^`]+)`", cell)]


@pytest.mark.slow
def test_messages_are_those_of_the_code():
    code, messages = texts(), quoted()
    assert len(messages) > 30
    patterns = {message: ".*".join(map(re.escape, message.split("..."))) for message in messages}
    assert not [message for message, pattern in patterns.items() if not re.search(pattern, code)]
