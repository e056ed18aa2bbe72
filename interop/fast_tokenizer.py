"""Tokenizers as transformers' own; imported by huggingface.py, which knows how to import transformers."""

from __future__ import annotations

import json

import tokenizers
from transformers import PreTrainedTokenizerFast

from ..modalities.text.tokenizer import Tokenizer


def to_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer as transformers': the same ids, padding on the left.

    The first token is the one that the tokenizer names for its template; where it names none, the end token.

    As transformers has it, names of special tokens in a text mean these tokens.
    """
    state = tokenizer.state()
    if "tokenizer" in state:
        inner = tokenizers.Tokenizer.from_str(json.dumps(state["tokenizer"]))
    else:
        inner = _bytes(sorted(tokenizer.special, key=lambda name: tokenizer.special[name]))
    end = next(name for name, i in tokenizer.special.items() if i == tokenizer.end)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=tokenizer.variables.get("bos_token", end),
        eos_token=end,
        pad_token=end,
        padding_side="left",
        chat_template=tokenizer.template,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _bytes(special: list[str]) -> tokenizers.Tokenizer:
    """The 256 bytes as `tokenizers` writes them: printable ones of Latin-1 as they are, all others from U+0100 on."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in shown)
    names = {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({names[byte]: byte for byte in range(256)}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in special])
    return inner
