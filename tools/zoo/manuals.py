"""Manuals that Debian packages install, as windows of tokens for the small GPT.

The text is documentation in plain files: Python's (reStructuredText), Git's (AsciiDoc), Vim's, and the POD parts of Perl's
modules. The split is by document (file): the SHA-256 of a document's name sends one document in 32 to each of calibration and
test, all others to training. Windows of the two held-out sides are ordered by their own SHA-256, which mixes the documents, is
the same in every process, and makes a smaller request a prefix of a larger one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from ...ir.errors import DataError
from .gpt import CONTEXT, VOCABULARY
from .samples import BATCH, Inputs, checked_count

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Side = Literal["training", "calibration", "test"]

TOKENIZER = Path(__file__).parent / "weights" / "gpt-small.tokenizer.json"
EVALUATION_WINDOWS = 500
TRAINING_WINDOWS = 8_192
#: Token 0 stands before every document.
BOUNDARY = "<|document|>"

_SHARE = 32


@dataclass(frozen=True)
class Source:
    """Documents of one Debian package: files `pattern` below the last of the folders `root`, both glob patterns."""

    package: str
    root: str
    pattern: str
    read: Callable[[str], str] = str


def pod_parts(text: str) -> str:
    """The documentation between the lines of a Perl module's code (perlpod)."""
    return "\n".join(re.findall(r"^=(?!cut)[a-z].*?(?=^=cut|\Z)", text, re.DOTALL | re.MULTILINE))


SOURCES = (
    Source("python3-doc", "/usr/share/doc/python3.*/html/_sources", "**/*.rst.txt"),
    Source("git-doc", "/usr/share/doc/git-doc", "**/*.txt"),
    Source("vim-runtime", "/usr/share/vim/vim[0-9]*/doc", "*.txt"),
    Source("perl", "/usr/share/perl/5.*.*", "**/*.pm", pod_parts),
)


def side_of(name: str) -> Side:
    """The side of the document called `name` (package and path below its root, so no version stands in it)."""
    number = hashlib.sha256(name.encode()).digest()[0] % _SHARE
    return "calibration" if number == 0 else "test" if number == 1 else "training"


def documents(side: Side, sources: tuple[Source, ...] = SOURCES) -> list[str]:
    """Texts of all documents of `side`, ordered by name; empty ones are left out.

    Raises:
        DataError: a package is not installed; the message names it.
    """
    texts = []
    for source in sources:
        roots = sorted(path for path in Path("/").glob(source.root.lstrip("/")) if not path.is_symlink())
        files = sorted(path for path in roots[-1].glob(source.pattern) if path.is_file()) if roots else []
        if not files:
            raise DataError(
                f"found no {source.pattern} in {source.root}: install the Debian package {source.package} "
                f"(apt-get install {source.package})"
            )
        for path in files:
            if side_of(f"{source.package}/{path.relative_to(roots[-1])}") == side:
                texts.append(source.read(path.read_text(encoding="utf-8", errors="replace")))
    return [text for text in texts if text.strip()]


def train_tokenizer(texts: Iterable[str], path: Path = TOKENIZER) -> None:
    """Learn byte-pair encoding of 1024 tokens on bytes (Sennrich et al., 2016; Radford et al., 2019) from `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOUNDARY],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))


@lru_cache(maxsize=1)
def load_tokenizer() -> Tokenizer:
    """The tokenizer in `weights`.

    Raises:
        DataError: the package `tokenizers` is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise DataError("tokenizing manuals needs tokenizers: run pip install 'graphwright[zoo]'") from error
    return Tokenizer.from_file(str(TOKENIZER))


def encode(texts: list[str]) -> list[list[int]]:
    """Token ids of each text, the boundary token first."""
    encodings = load_tokenizer().encode_batch([BOUNDARY + text for text in texts], add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


@lru_cache(maxsize=2)
def held_out_windows(side: Literal["calibration", "test"]) -> torch.Tensor:
    """`(N, 257)` int64: each document of `side` cut every 256 tokens, each window with the token that follows it."""
    windows = []
    for ids in encode(documents(side)):
        whole = torch.tensor(ids)
        if len(whole) > CONTEXT:
            windows.extend(whole.unfold(0, CONTEXT + 1, CONTEXT))
    return torch.stack(sorted(windows, key=lambda window: hashlib.sha256(window.numpy().tobytes()).digest()))


@lru_cache(maxsize=1)
def training_tokens() -> torch.Tensor:
    """`(N,)` int64: the training documents one after the other. Takes about half a minute."""
    return torch.tensor([token for ids in encode(documents("training")) for token in ids])


class Manuals:
    """Samples for the small GPT: inputs `(N, 256)` int64 token ids, labels `(N, 256)` int64, the token after each."""

    def calibration(self, count: int) -> list[Inputs]:
        """`count` windows of the calibration documents."""
        windows = held_out_windows("calibration")
        count = checked_count(count, len(windows), "calibration windows")
        return [(batch[:, :-1].contiguous(),) for batch in windows[:count].split(BATCH)]

    def training(self, count: int | None) -> list[Inputs] | None:
        """The first `count` windows of the training documents, at random places; 8,192 by default."""
        count = checked_count(count, TRAINING_WINDOWS, "training windows")
        tokens = training_tokens()
        starts = torch.randint(len(tokens) - CONTEXT, (count,), generator=torch.Generator().manual_seed(0))
        windows = torch.stack([tokens[start : start + CONTEXT] for start in starts])
        return [(batch,) for batch in windows.split(BATCH)]

    def calibration_labels(self, count: int) -> torch.Tensor | None:
        """The token after each of theirs."""
        windows = held_out_windows("calibration")
        return windows[: checked_count(count, len(windows), "calibration windows"), 1:].contiguous()

    def evaluation(self, count: int | None) -> Iterable[tuple[Inputs, torch.Tensor | None]]:
        """`count` windows (500 by default) of the test documents, with the token that follows each."""
        windows = held_out_windows("test")
        count = checked_count(count, min(EVALUATION_WINDOWS, len(windows)), "evaluation windows")
        for batch in windows[:count].split(BATCH):
            yield (batch[:, :-1].contiguous(),), batch[:, 1:].contiguous()
