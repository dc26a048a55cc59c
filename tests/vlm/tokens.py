"""A vocabulary of letters, and the files of its tokenizer."""

import json
import string
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PAD, UNKNOWN, BEGIN, END = COMMON = ("<pad>", "<unk>", "<s>", "</s>")
# As GPT-2 writes bytes: the only kind that transformers reads for every family.
LETTERS = string.digits + string.ascii_letters + string.punctuation + "ĠĊ"


def vocabulary(specials: tuple[str, ...]) -> dict[str, int]:
    """Return ids by token: common specials, the family's specials, then letters."""
    return {token: i for i, token in enumerate((*COMMON, *specials, *LETTERS))}


def chat_template(image: str = "", video: str = "", start: str = BEGIN) -> str:
    """Return a Jinja template that writes `image` and `video` in messages."""
    return (
        start + "{%- for m in messages -%}{{ m['role'] + ':' }}"
        "{%- if m['content'] is string -%}{{ m['content'] }}{%- else -%}"
        "{%- for c in m['content'] -%}"
        "{%- if c['type'] == 'image' -%}" + image + "{%- elif c['type'] == 'video' -%}"
        "" + video + "{%- else -%}{{ c['text'] }}{%- endif -%}"
        "{%- endfor -%}{%- endif -%}{{ '\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}assistant:{%- endif -%}"
    )


def write_tokenizer(
    folder: Path, specials: tuple[str, ...], named: dict[str, str], template: str | None
) -> None:
    """Write a fast tokenizer with the `named` special tokens as attributes."""
    tokenizer = Tokenizer(models.BPE(vocabulary(specials), []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in (*COMMON, *specials)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "bos_token": BEGIN,
        "eos_token": END,
        "extra_special_tokens": named,
    }
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
