"""The README's Python runs as it stands, from top to bottom."""

import re
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def test_python_blocks_run() -> None:
    text = README.read_text()
    blocks = list(BLOCK.finditer(text))
    assert blocks
    scope: dict[str, Any] = {}
    for block in blocks:
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], str(README), "exec"), scope)


def test_first_block_stands_alone() -> None:
    block = BLOCK.search(README.read_text())
    assert block is not None
    exec(block[1], {})
