"""The examples of docs/python.md run as they stand."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


def test_examples(capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 7
    exec(compile("\n".join(blocks), PAGE.name, "exec"), {})
    assert "k shape k: axis 3 (head_dim) is 32; allowed is 64, as in q" in capsys.readouterr().out
