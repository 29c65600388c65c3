"""The tokenizer against transformers and diffusers themselves, on prompts of random awkward parts."""

import json
import random
import re
import sys
import unicodedata

import pytest

from tests.golden import prompts as golden
from vidar.preparation.tokenizer import Tokenizer, clean

pytestmark = pytest.mark.parity

PARTS = ["a", "cat", "walks", " ", "  ", "\n", "\u3000", "</s>", "<extra_id_3>", "<pad>", "<unk>", "<s>", "🦊", "一"]
PARTS += [
    "é",
    "e\u0301",
    "Ａ",
    "&amp;",
    "&lt;/s&gt;",
    "\u00ad",
    "ﬁ",
    "مر",
    "\u200d",
    "\x00",
    "\u0323",
    "!",
    "ﷺ",
    "&#13;",
]
MARKS = ["▁", "<0x41>", "&#9601;"]  # which sentencepiece itself takes for text


def awkward(parts: list[str]) -> list[str]:
    chosen = random.Random(0)
    return ["".join(chosen.choices(parts, k=chosen.randint(1, 14))) for _ in range(2000)]


def split(tokenizer: Tokenizer, prompts: list[str], length: int) -> list[list[int]]:
    token_bs, length_b = tokenizer(prompts, length)
    return [row[:end].tolist() for row, end in zip(token_bs, length_b, strict=True)]


def test_the_stored_tokens_are_those_of_transformers():
    found = golden.tokens(golden.reference(golden.FOLDER), list(golden.PROMPTS.values()), golden.LENGTH)
    assert dict(zip(golden.PROMPTS, found, strict=True)) == json.loads(golden.TOKENS.read_text())


def test_the_automatic_tokenizer_of_transformers_is_the_reference(tmp_path):
    from transformers import AutoTokenizer

    (tmp_path / "config.json").write_text('{"model_type": "umt5"}')
    (tmp_path / "tokenizer.json").write_bytes((golden.FOLDER / "tokenizer.json").read_bytes())
    special = dict(eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    automatic = AutoTokenizer.from_pretrained(tmp_path, **special)
    prompts = awkward(PARTS + MARKS)
    assert golden.tokens(automatic, prompts, 20) == split(Tokenizer(tmp_path), prompts, 20)


@pytest.mark.parametrize("name, parts", [("tokenizer.json", PARTS + MARKS), ("spiece.model", PARTS)])
def test_tokens_are_those_of_transformers(name, parts):
    prompts = awkward(parts)
    expected = golden.tokens(golden.reference(golden.FOLDER), prompts, 20)
    assert split(Tokenizer(golden.FOLDER / name), prompts, 20) == expected


def test_transformers_reads_the_sentencepiece_model_alike_but_for_its_bytes(tmp_path):
    # Its own conversion knows no byte pieces, so only prompts of known characters compare.
    from transformers import T5Tokenizer

    (tmp_path / "spiece.model").write_bytes((golden.FOLDER / "spiece.model").read_bytes())
    prompts = awkward(["a", "cat", "walks", " the", "</s>", "<extra_id_3>", "<pad>", "</s> on", " camera"])
    expected = golden.tokens(T5Tokenizer.from_pretrained(tmp_path, extra_ids=300), prompts, 20)
    assert split(Tokenizer(tmp_path), prompts, 20) == expected


def test_cleaning_is_diffusers():
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    characters = [chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) != "Cn"]
    for text in ["a" + character + " b" for character in characters if ord(character) < 0x3000] + awkward(
        PARTS + MARKS
    ):
        assert clean(text) == prompt_clean(text), repr(text)
    spaces = "".join(f"x{character}" for character in characters if re.match(r"\s", character))
    assert clean(spaces) == prompt_clean(spaces)
