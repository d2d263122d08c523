"""Real text and a real tokenizer without a network: the source of Python's library, and a BPE trained on it."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_FILE = "<|endoftext|>"
_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib"}


def source_files() -> list[Path]:
    """The standard library's source files, in an order that is always the same and mixes its packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(root.rglob("*.py")) if not _LEFT_OUT & set(path.relative_to(root).parts)]
    random.Random(0).shuffle(files)
    return files


def read(files: Sequence[Path], each: Callable[[], None] = lambda: None) -> list[str]:
    """Their texts; ``each`` is called after each file."""
    texts = []
    for path in files:
        texts.append(path.read_text(encoding="utf-8", errors="replace"))
        each()
    return texts


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE tokenizer of ``vocabulary`` tokens, :data:`END_OF_FILE` among them.

    Raises:
        ValueError: if the texts are too short for so many.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_FILE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise ValueError(f"the texts give {tokenizer.get_vocab_size()} tokens, and not {vocabulary}")
    return tokenizer


def token_stream(tokenizer: Tokenizer, texts: Sequence[str], count: int) -> list[int]:
    """``count`` token ids: the texts one after the other, each with its end, and all again if they are too few."""
    end = tokenizer.token_to_id(END_OF_FILE)
    assert end is not None and texts
    stream: list[int] = []
    for text in texts:
        stream += [*tokenizer.encode(text).ids, end]
        if len(stream) >= count:
            break
    return (stream * (count // len(stream) + 1))[:count]
