"""Prompts to tokens, as Wan makes them: cleaned, split into pieces by UMT5's tokenizer, ended, padded.

It reads the files that come with an encoder and downloads nothing. It must not know networks or videos.
"""

import html
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vidar.errors import ConfigError, check_range

PAD, END = "<pad>", "</s>"
PAD_ID, END_ID = 0, 1
JSON, PIECES = "tokenizer.json", "spiece.model"
SENTINELS = 300  # UMT5's <extra_id_…>, which its tokenizer.json lists and its spiece.model does not
PADDED_TO = 128  # the rows of T5's, mT5's and UMT5's tables are their tokens, rounded up to this
_logger = logging.getLogger(__name__)


def clean(text: str) -> str:
    """Mends a prompt's characters and its white space, as Wan does with every prompt.

    Args:
        text: The prompt.

    Returns:
        The prompt with broken encodings, character entities (twice) and runs of white space mended.

    Raises:
        ConfigError: ftfy is not installed.
    """
    try:
        import ftfy
    except ImportError as error:
        raise _not_installed("ftfy") from error
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()


class Tokenizer:
    """UMT5's tokenizer, read from a file of its own.

    A directory may hold both forms; `tokenizer.json` is preferred: it is the one that transformers itself runs, with
    the sentinels listed. (Left with `spiece.model` alone, transformers 5 converts it without its byte pieces, so that
    an emoji becomes an unknown token.)

    Args:
        path: A `tokenizer.json`, a sentencepiece model, or a directory with either.

    Attributes:
        path: The file that was read.

    Raises:
        ConfigError: There is no such file, it is no tokenizer or none of the T5 family, or a library is missing.
    """

    def __init__(self, path: str | Path):
        self.path = _file(Path(path))
        kind = _JsonPieces if self.path.suffix == ".json" else _SentencePieces
        self._pieces = kind(self.path)
        for piece, expected in ((PAD, PAD_ID), (END, END_ID)):
            found = self._pieces.number(piece)
            if found != expected:
                raise ConfigError(
                    f"{self.path}: {piece} is token {found}, UMT5's is {expected}; use google/umt5-xxl's tokenizer"
                )

    @property
    def vocabulary(self) -> int:
        """How many tokens it knows."""
        return self._pieces.vocabulary

    def check_vocabulary(self, size: int) -> None:
        """Refuses an encoder that was made for another tokenizer.

        Args:
            size: Rows of the encoder's table; as many as there are tokens, rounded up to 128 at most.

        Raises:
            ConfigError: There are more tokens than rows, or far fewer.
        """
        if not self.vocabulary <= size < self.vocabulary + PADDED_TO:
            raise ConfigError(
                f"{self.path}: knows {self.vocabulary} tokens, the text encoder {size}; use the tokenizer that came "
                "with the encoder"
            )

    def __call__(self, prompts: Sequence[str], length: int = 512) -> tuple[np.ndarray, np.ndarray]:
        """Splits prompts.

        Args:
            prompts: The prompts; they are cleaned here.
            length: Tokens of a row, ≥ 1. A longer prompt is cut, and keeps the token that ends it; the log says so.

        Returns:
            Tokens int32 `[b, length]`, padded, and each prompt's own, its end included, int32 `[b]`.

        Raises:
            ConfigError: A prompt is no text.
        """
        check_range("length", length, least=1)
        check_prompts(prompts)
        token_bs = np.full((len(prompts), length), PAD_ID, np.int32)
        length_b = np.zeros(len(prompts), np.int32)
        for row, prompt in enumerate(prompts):
            text = clean(prompt)
            tokens = self._pieces.split(text)
            if len(tokens) >= length:
                _logger.warning("prompt %.40r… was truncated from %d to %d tokens", text, len(tokens) + 1, length)
            tokens = [*tokens[: length - 1], END_ID]
            token_bs[row, : len(tokens)] = tokens
            length_b[row] = len(tokens)
        return token_bs, length_b


def check_prompts(prompts: Sequence[str]) -> None:
    """Refuses what is no list of prompts.

    Args:
        prompts: What may be one.

    Raises:
        ConfigError: It is a single text, or holds something else than texts; the message names the first.
    """
    if isinstance(prompts, str):
        raise ConfigError(f"prompts: {prompts[:40]!r} is a single text; give a list of prompts")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ConfigError(f"prompts: number {index} is {type(prompt).__name__}, not text: {str(prompt)[:40]}")


class _JsonPieces:
    """The tokenizers library's form; special tokens within a prompt stand for themselves, as in transformers."""

    def __init__(self, path: Path):
        try:
            import tokenizers
        except ImportError as error:
            raise _not_installed("tokenizers") from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise _no_tokenizer(path, error) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocabulary: int = self._tokenizer.get_vocab_size()

    def number(self, piece: str) -> int | None:
        return self._tokenizer.token_to_id(piece)

    def split(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids


class _SentencePieces:
    """Sentencepiece's form, with special tokens and sentinels as transformers adds them.

    What lies between two of them is split as if it stood alone. Two things differ from `tokenizer.json`: a bare "▁",
    sentencepiece's mark of a space, and the written name of a byte piece, "<0x41>", which is mere text here.
    """

    def __init__(self, path: Path):
        try:
            import sentencepiece
        except ImportError as error:
            raise _not_installed("sentencepiece") from error
        try:
            self._model = model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise _no_tokenizer(path, error) from error
        known = model.get_piece_size()
        self.vocabulary = known + SENTINELS
        self._special = {model.id_to_piece(i): i for i in range(known) if model.is_control(i) or model.is_unknown(i)}
        self._special |= {f"<extra_id_{i}>": self.vocabulary - 1 - i for i in range(SENTINELS)}
        self._between = re.compile("(" + "|".join(map(re.escape, self._special)) + ")")

    def number(self, piece: str) -> int | None:
        return self._special.get(piece)

    def split(self, text: str) -> list[int]:
        tokens = []
        for part in self._between.split(text):
            tokens += [self._special[part]] if part in self._special else self._model.encode(part)
        return tokens


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise ConfigError(f"{path}: no such tokenizer; give a {JSON}, a {PIECES}, or a directory with either")
    for name in (JSON, PIECES):
        if (path / name).is_file():
            return path / name
    raise ConfigError(f"{path}: holds neither {JSON} nor {PIECES}; give the directory that came with the encoder")


def _no_tokenizer(path: Path, error: Exception) -> ConfigError:
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    return ConfigError(f"{path}: not a tokenizer ({reason}); give a {JSON} or a {PIECES}")


def _not_installed(library: str) -> ConfigError:
    return ConfigError(f"prompts need {library}: pip install -e '.[text]'")
