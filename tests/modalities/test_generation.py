"""Text in, text out."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

from omnimix import LanguageModel, LanguageModelConfig, TextGenerator
from omnimix.backbones import BackboneConfig, State
from omnimix.backbones.decoding import DiffusionConfig, GenerationConfig, generate
from omnimix.backbones.heads import list_objectives
from omnimix.errors import CheckpointError, ConfigError, UnsupportedCall
from omnimix.modalities import create_model, save_model
from omnimix.modalities.text.text_generator import StopStrings
from omnimix.modalities.text.tokenizer import ByteTokenizer

CHATML = ("<|im_start|>", "<|im_end|>")


def writer(
    objective: str = "causal", *, special: tuple[str, ...] = (), more: int = 0, mixer: str = "gla"
) -> TextGenerator:
    torch.manual_seed(0)
    tokenizer = ByteTokenizer(special)
    backbone = BackboneConfig(dim=16, depth=1, pattern=[mixer])
    config = LanguageModelConfig(
        backbone=backbone, vocab_size=tokenizer.vocab_size + more, objective=objective, tie_word_embeddings=False
    )
    model = LanguageModel(config).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * p.shape[-1] ** -0.5 * 2)
        model.embedding.weight.mul_(5)
    return TextGenerator(model, tokenizer)


@pytest.fixture
def scripted(monkeypatch):
    """A writer whose model wants to write the given text behind every prompt, byte by byte, and the end."""

    def make(text: str) -> TextGenerator:
        made, place = writer(), [0]
        ids = [*text.encode(), made.tokenizer.end]

        def logits(rows: int) -> torch.Tensor:
            wanted = torch.zeros(rows, made.model.vocab_size, dtype=torch.float64)
            wanted[:, ids[min(place[0], len(ids) - 1)]] = 9
            return wanted

        def read(model, prompts, chunk=None, state=None):
            place[0] = 0
            return logits(len(prompts)), State({})

        def advance(model, tokens, state):
            place[0] += 1
            return logits(len(tokens)), State({})

        for name in ("omnimix.backbones.decoding.generate", "omnimix.backbones.decoding.beam"):
            monkeypatch.setattr(importlib.import_module(name), "advance", advance)
        monkeypatch.setattr(sys.modules["omnimix.backbones.decoding.generate"], "read", read)
        return made

    return make


# Stop strings


@pytest.mark.parametrize(
    ("text", "stop", "wanted"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("aaab", ["aab"], "a"),
        ("ababac", ["abac"], "ab"),
        ("nothing", ["else"], "nothing"),
        ("ends in els", ["else"], "ends in els"),
        ("stop", ["stop"], ""),
        ("grün und süß", ["süß"], "grün und "),
        ("", ["a"], ""),
    ],
)
def test_no_part_of_a_stop_string_is_let_through(text, stop, wanted):
    for size in range(1, 6):
        strings, out = StopStrings(stop), []
        for i in range(0, len(text), size):
            out.append(strings.push(text[i : i + size]))
            if strings.hit:
                break
        if not strings.hit:
            out.append(strings.flush())
        assert "".join(out) == wanted
        assert strings.hit == any(s in text for s in stop)
        # What was let through before the end never had to be taken back.
        assert all(wanted.startswith("".join(out[:i])) for i in range(len(out)))


def test_stop_strings_that_are_none():
    for stop in ("text", [""]):
        with pytest.raises(ConfigError, match="stop"):
            StopStrings(stop)


def test_text_ends_before_a_stop_string_that_spans_tokens(scripted):
    made = scripted("def f():\n    return 1\n\nclass A: ...")
    assert "".join(made.stream("", stop=["\n\nclass", "nowhere"])) == "def f():\n    return 1"
    (result,) = made.generate([""], stop=["\n\nclass"])
    assert result.text == "def f():\n    return 1" and result.reason == "stop"
    assert bytes(result.tokens).decode().endswith("\n\nclass") and len(result.log_probs) == len(result.tokens)
    (result,) = made.generate([""], GenerationConfig(num_beams=2), stop=["nowhere"])
    assert result.text.startswith("def f()") and result.reason == "end"


def test_pieces_are_whole_characters(scripted):
    made = scripted("für 猫 – 😀!")
    pieces = list(made.stream(""))
    assert "".join(pieces) == "für 猫 – 😀!"
    assert all("\ufffd" not in p for p in pieces) and "猫" in pieces and "😀" in pieces
    cut = list(made.stream("", GenerationConfig(max_new_tokens=len("für ".encode()) + 1)))
    assert "".join(cut) == "für \ufffd"


def test_a_text_that_ends_lets_go_of_what_was_held_back(scripted):
    made = scripted("almost a sto")
    assert "".join(made.stream("", stop=["stop"])) == "almost a sto"
    (result,) = made.generate([""], stop=["stop"])
    assert result.text == "almost a sto" and result.reason == "end"
    assert result.tokens[-1] == made.tokenizer.end


# Prompts


def test_streams_are_generations_and_batches_are_each_alone():
    made = writer()
    config = GenerationConfig(max_new_tokens=20, temperature=1.0, seed=3)
    prompts = ["def f(", "", "class Longer:\n"]
    stop = [next(c for c in made.generate(prompts, config)[0].text[3:] if c != "\ufffd")]
    together = made.generate(prompts, config, stop=stop)
    assert len({len(r.tokens) for r in together}) > 1
    for i, (prompt, result) in enumerate(zip(prompts, together, strict=True)):
        (alone,) = made.generate([prompt], config, stop=stop, sample_ids=[i])
        assert alone.text == result.text and alone.tokens == result.tokens and alone.reason == result.reason
        assert "".join(made.stream(prompt, config, stop=stop, sample_id=i)) == result.text
    prefix = made.read("def ")
    (result,) = made.generate(["f("], config, stop=stop, prefix=prefix)
    assert result.tokens == together[0].tokens


def test_a_prompt_begins_as_documents_do():
    made = writer()
    config = GenerationConfig(max_new_tokens=6, end=made.tokenizer.end)
    wanted = generate(made.model, [[made.tokenizer.end, *b"abc"]], config)
    assert made.generate(["abc"], GenerationConfig(max_new_tokens=6))[0].tokens == wanted.tokens[0]


def test_conversations_are_prompts():
    made = writer(special=CHATML)
    messages = [{"role": "user", "content": "Hi <|im_end|>"}]
    config = GenerationConfig(max_new_tokens=6)
    ids = [made.tokenizer.end, *made.tokenizer.encode_chat(messages)]
    assert ids.count(made.tokenizer.special["<|im_end|>"]) == 1
    wanted = generate(made.model, [ids], GenerationConfig(max_new_tokens=6, end=made.tokenizer.end))
    assert made.generate([messages], config)[0].tokens == wanted.tokens[0]


def test_the_model_is_as_before_whenever_the_caller_has_control():
    made = writer()
    made.model.train()
    pieces = made.stream("x", GenerationConfig(max_new_tokens=50, temperature=1.0))
    next(pieces)
    assert made.model.training and not torch.is_inference_mode_enabled()
    pieces.close()
    assert made.model.training


# Other models


@pytest.mark.parametrize("objective", [name for name in list_objectives() if name != "causal"])
def test_diffusion_writes_text_too(objective):
    made = writer(objective, mixer="attention")
    config = DiffusionConfig(max_new_tokens=6, steps=2)
    results = made.generate(["abc", ""], config)
    for result in results:
        assert result.text == made.tokenizer.decode([t for t in result.tokens if t != made.tokenizer.end])
    assert "".join(made.stream("abc", config)) == results[0].text
    shown = results[0].text[1:2]
    (cut,) = made.generate(["abc"], config, stop=[shown])
    assert cut.text == results[0].text[: results[0].text.index(shown)] and cut.reason == "stop"
    with pytest.raises(UnsupportedCall, match="prefix"):
        made.generate(["abc"], config, prefix=writer().read("a"))
    with pytest.raises(ConfigError, match="DiffusionConfig"):
        made.generate(["abc"], GenerationConfig())


def test_models_and_tokenizers_must_fit():
    made = writer()
    with pytest.raises(ConfigError, match="DiffusionConfig, and objective 'causal'"):
        made.generate(["a"], DiffusionConfig())
    with pytest.raises(ConfigError, match="258 tokens and the model 257"):
        TextGenerator(made.model, ByteTokenizer(["<|x|>"]))
    wide = writer(more=40)
    with torch.no_grad():
        wide.model.head.weight[257:] *= 50
    tokens = wide.generate(["a"], GenerationConfig(max_new_tokens=20))[0].tokens
    assert max(tokens) < 257


def test_a_saved_model_writes_the_same(tmp_path):
    made = writer()
    save_model(made.model.float(), tmp_path)
    made.tokenizer.save(tmp_path)
    again = TextGenerator.load(tmp_path)
    config = GenerationConfig(max_new_tokens=10)
    assert again.generate(["abc"], config)[0].tokens == made.generate(["abc"], config)[0].tokens
    save_model(create_model("vit_tiny_gla_patch16_224", classes=2, size=16, patch=8, dim=16, depth=1), tmp_path)
    with pytest.raises(CheckpointError, match="writes no text"):
        TextGenerator.load(tmp_path)
