"""What transformers makes of awkward prompts, with a small tokenizer built the way UMT5's is.

`python -m tests.golden.prompts` (with the `parity` extra) trains the tokenizer and writes it in both of its forms, and
the tokens that the default suite compares with.
"""

import io
import json
from pathlib import Path

FOLDER = Path(__file__).with_name("umt5")
TOKENS = FOLDER / "tokens.json"
LENGTH = 48
CORPUS = (
    "a cat walks on the grass, realistic style",
    "A red fox walks across the snow; the camera follows it slowly.",
    "A café at night: neon lights, rain on the window, a person reads a book.",
    "two dogs & a boat < the sea > 10 mountains",
    "timelapse of clouds over a city, warm light, 4k, cinematic",
    "the person turns and looks into the camera, a close shot of the face",
    "一只红狐狸走过雪地。",
    "猫在草地上行走，阳光明媚",
    "مرحبا بالعالم",
)
# A few of the rules with which UMT5's model normalises: ligatures, full width, odd spaces, combining accents.
RULES = {"FB01": "66 69", "FF21": "41", "FF42": "62", "3000": "20", "A0": "20", "65 301": "E9", "AD": ""}
PROMPTS = {
    "plain": "A red fox walks across the snow.",
    "empty": "",
    "blank": " \t\n\u3000\u00a0 ",
    "spaces": "  the   cat \t on\n\nthe\r\ngrass  ",
    "emoji": "a cat 🦊 walks 👨\u200d👩\u200d👧 on the grass ☕️",
    "chinese": "一只红狐狸走过雪地。龘",
    "arabic": "مرحبا بالعالم ثعلب",
    "entities": "two dogs &amp;amp; a boat &amp;lt;b&amp;gt; &eacute; &#x1F98A; &nbsp; end",
    "entities and tags": "the <b>cat</b> &amp;lt;walks&amp;gt;",
    "triple entity": "two dogs &amp;amp;amp;amp; a boat",
    "tags": "<b>the cat</b> &lt;i&gt;walks&lt;/i&gt;",
    "mojibake": "the cafÃ© â€œat nightâ€\x9d",
    "sentinel": "a cat <extra_id_0> walks<extra_id_299> <extra_id_300>",
    "end inside": "hello</s>world </s> the end",
    "special": "a <pad> cat<unk>walks <s> on",
    "doubled": "</s></s><extra_id_1><extra_id_1>",
    "full width": "Ａ ｂ ｗｉｄｅ ｃａｔ！",
    "control": "a\x00cat\x07walks\x1b[31m on\x7f the\ufeff grass",
    "accents": "cafe\u0301 cafe\u0301\u0323 é",
    "ligature": "a ﬁne ca\u00adt",
    "marker": "a▁cat ▁▁ walks",
    "surrogate": "a cat \ud83e\udd8a walks \ud83d",
    "long": "the cat walks " * 200,
    "long word": "catwalk" * 1500,
    "exact": "a " * (LENGTH - 1),
    "one more": "a " * LENGTH,
    "quotes": "‘the’ “cat” — walks… 10½",
}


def model() -> bytes:
    """A sentencepiece model with UMT5's conventions: <pad>, </s>, <s> and <unk> first, then 256 bytes."""
    import sentencepiece

    rules, written = FOLDER / "rules.tsv", io.BytesIO()
    rules.write_text("".join(f"{source}\t{target}\n" for source, target in RULES.items()))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS * 4),
            model_writer=written,
            vocab_size=350,
            model_type="unigram",
            byte_fallback=True,
            character_coverage=0.98,
            normalization_rule_tsv=str(rules),
            pad_id=0,
            eos_id=1,
            bos_id=2,
            unk_id=3,
            pad_piece="<pad>",
            num_threads=1,
            minloglevel=2,
        )
    finally:
        rules.unlink()
    return written.getvalue()


def converted(path: Path):
    """The model as a `tokenizers.Tokenizer`, made by the converter of transformers as UMT5's was."""
    from transformers.convert_slow_tokenizer import T5Converter

    class Slow:  # what the converter asks of the tokenizer that it converts
        vocab_file, _extra_ids = str(path), 300

        def convert_tokens_to_ids(self, token):
            return {"</s>": 1}[token]

    class Converter(T5Converter):
        handle_byte_fallback = True

    tokenizer = Converter(Slow()).converted()
    tokenizer.add_special_tokens(["<unk>"])
    tokenizer.add_special_tokens([f"<extra_id_{index}>" for index in range(300)])
    return tokenizer


def reference(folder: Path):
    """The tokenizer of transformers: what `AutoTokenizer` opens for UMT5."""
    from transformers import TokenizersBackend

    special = dict(eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    return TokenizersBackend(tokenizer_file=str(folder / "tokenizer.json"), **special)


def tokens(tokenizer, prompts, length: int) -> list[list[int]]:
    """Tokens without padding, as diffusers' pipeline of Wan makes them."""
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    options = dict(padding="max_length", max_length=length, truncation=True, add_special_tokens=True)
    found = tokenizer([prompt_clean(prompt) for prompt in prompts], return_attention_mask=True, **options)
    return [row[: sum(mask)] for row, mask in zip(found["input_ids"], found["attention_mask"], strict=True)]


def main() -> None:
    """Writes the model, its other form and the tokens."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "spiece.model").write_bytes(model())
    compact = json.loads(converted(FOLDER / "spiece.model").to_str())
    (FOLDER / "tokenizer.json").write_text(json.dumps(compact, separators=(",", ":")))
    found = tokens(reference(FOLDER), list(PROMPTS.values()), LENGTH)
    TOKENS.write_text("{\n" + ",\n".join(f' "{k}": {v}' for k, v in zip(PROMPTS, found, strict=True)) + "\n}\n")


if __name__ == "__main__":
    main()
