"""What pyproject.toml cannot say: the README for a package index, where links into the repository lead nowhere."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup


def alone(readme: str) -> str:
    """A README without the pictures and links that need the files around it; their text stays."""
    inside = r"\((?!https?:|#)[^)]*\)"
    readme = re.sub(rf"!\[[^\]]*\]{inside}\n*", "", readme)
    return re.sub(rf"\[([^\]]*)\]{inside}", r"\1", readme)


if __name__ == "__main__":
    text = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    setup(long_description=alone(text), long_description_content_type="text/markdown")
