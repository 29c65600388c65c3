"""The tokenizer against tokens that transformers made (tests/golden/prompts.py), and what it refuses."""

import json
import logging
import sys

import numpy as np
import pytest

from tests.golden import prompts as golden
from vidar.errors import ConfigError
from vidar.preparation import tokenizer as module
from vidar.preparation.tokenizer import Tokenizer, clean

FORMS = ("tokenizer.json", "spiece.model")


@pytest.fixture(params=FORMS)
def tokenizer(request):
    pytest.importorskip("ftfy")
    pytest.importorskip("tokenizers" if request.param == "tokenizer.json" else "sentencepiece")
    return Tokenizer(golden.FOLDER / request.param)


@pytest.mark.parametrize("name", golden.PROMPTS)
def test_tokens_are_those_of_transformers(tokenizer, name):
    expected = json.loads(golden.TOKENS.read_text())[name]
    token_bs, length_b = tokenizer([golden.PROMPTS[name]], golden.LENGTH)
    assert token_bs.dtype == length_b.dtype == np.int32
    assert token_bs.shape == (1, golden.LENGTH)
    assert length_b.tolist() == [len(expected)]
    assert token_bs[0].tolist() == expected + [0] * (golden.LENGTH - len(expected))


def test_rows_do_not_depend_on_each_other(tokenizer):
    prompts = [golden.PROMPTS[name] for name in ("emoji", "empty", "special", "long")]
    token_bs, length_b = tokenizer(prompts, 16)
    assert length_b.tolist() == [16, 1, 13, 16]
    for row, prompt in enumerate(prompts):
        np.testing.assert_array_equal(tokenizer([prompt], 16)[0][0], token_bs[row])


def test_a_very_long_prompt_is_cut_before_its_end_token_and_the_log_says_so(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        token_bs, length_b = tokenizer(["cat " * 25_000, "a cat"])
    assert length_b.tolist() == [512, 4]
    assert token_bs[0, :511].tolist() == [300, 273] * 255 + [300]
    assert token_bs[0, 511] == 1
    assert [record.getMessage() for record in caplog.records] == [
        "prompt 'cat cat cat cat cat cat cat cat cat cat… was truncated from 50001 to 512 tokens"
    ]


def test_a_prompt_that_just_fits_is_not_cut(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        _, length_b = tokenizer([golden.PROMPTS["exact"]], golden.LENGTH)
        assert not caplog.records
        tokenizer([golden.PROMPTS["one more"]], golden.LENGTH)
    assert length_b.tolist() == [golden.LENGTH]
    assert "from 49 to 48 tokens" in caplog.records[0].getMessage()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("  a \t cat\n\n", "a cat"),
        ("a&amp;amp;b &lt;i&gt; c", "a&b <i> c"),
        ("<b> &amp;lt;i&amp;gt;", "<b> <i>"),
        ("the cafÃ©", "the café"),
        ("Ａ\u3000cat", "A cat"),
        ("a\x00\x1bcat", "acat"),
        ("“a”", '"a"'),
        ("", ""),
    ],
)
def test_cleaning(text, expected):
    pytest.importorskip("ftfy")
    assert clean(text) == expected


def test_the_vocabulary_must_be_the_encoders(tokenizer):
    assert tokenizer.vocabulary == 350 + 300
    for size in (650, 768, 777):
        tokenizer.check_vocabulary(size)
    for size in (649, 778, 256384):
        with pytest.raises(ConfigError, match=f"knows 650 tokens, the text encoder {size}; use the tokenizer that"):
            tokenizer.check_vocabulary(size)


@pytest.mark.parametrize(
    "prompts, named", [("a cat", "a single text"), (["a", 3], "number 1 is int"), ([None], "None")]
)
def test_what_is_no_list_of_prompts_is_refused(tokenizer, prompts, named):
    with pytest.raises(ConfigError, match=named):
        tokenizer(prompts)


def test_a_directory_prefers_the_form_that_transformers_runs(tmp_path):
    pytest.importorskip("tokenizers")
    pytest.importorskip("sentencepiece")
    with pytest.raises(ConfigError, match="holds neither tokenizer.json nor spiece.model"):
        Tokenizer(tmp_path)
    for name in reversed(FORMS):
        (tmp_path / name).write_bytes((golden.FOLDER / name).read_bytes())
        assert Tokenizer(tmp_path).path == tmp_path / name


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such tokenizer; give a tokenizer.json"):
        Tokenizer(tmp_path / "absent.model")


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("content", [b"", b"{}", b"no tokenizer", bytes(range(256)) * 9])
def test_another_file_is_refused(tmp_path, name, content):
    pytest.importorskip("tokenizers" if name == "tokenizer.json" else "sentencepiece")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name}: not a tokenizer .*; give a tokenizer.json") as caught:
        Tokenizer(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_special_tokens_in_other_places_are_refused(tmp_path):
    pytest.importorskip("tokenizers")
    other = json.loads((golden.FOLDER / "tokenizer.json").read_text())
    pieces = other["model"]["vocab"]
    pieces[1], pieces[2] = pieces[2], pieces[1]
    other["added_tokens"] = [token for token in other["added_tokens"] if token["content"] not in ("</s>", "<s>")]
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(ConfigError, match="</s> is token 2, UMT5's is 1"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("library", ["ftfy", "tokenizers", "sentencepiece"])
def test_a_missing_library_names_the_extra(monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=rf"need {library}: pip install -e '\.\[text\]'"):
        clean("a") if library == "ftfy" else Tokenizer(golden.FOLDER / FORMS[library == "sentencepiece"])


def test_sentinels_are_umt5s():
    # 256,000 pieces and 300 sentinels, rounded up to 128 rows, are the 256,384 rows of UMT5-XXL's table.
    assert -(-(256_000 + module.SENTINELS) // module.PADDED_TO) * module.PADDED_TO == 256_384
