"""transformers' contract: save, load, generate, train; compared with omnimix's own model and decoding."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch

import omnimix
from omnimix.backbones.decoding import GenerationConfig, generate
from omnimix.backbones.decoding.sampling import filtered, seen_tokens
from omnimix.backbones.ffn.moe import MoEConfig
from omnimix.backbones.heads.causal import CausalConfig
from omnimix.errors import CheckpointError, UnsupportedCall, UnsupportedShape
from omnimix.modalities import save_model
from omnimix.modalities.text.chat import TURN
from omnimix.modalities.text.tokenizer import BPETokenizer, ByteTokenizer, train_bpe

transformers = pytest.importorskip("transformers")
# Before anything of transformers is used: pytest has put our folder `kernels` on the path.
hf = omnimix.huggingface

ROOT = Path(__file__).parents[2]
BYTES = ByteTokenizer(TURN)
TEXTS = ["hello", "a longer prompt, é", "x"]


def language_model(*, vocab_size: int = BYTES.vocab_size, pattern=("gated_deltanet", "attention"), **options):
    torch.manual_seed(0)
    backbone = {"dim": 32, "depth": 2, "pattern": list(pattern)}
    backbone |= {name: options.pop(name) for name in ("ffn",) if name in options}
    config = omnimix.LanguageModelConfig(backbone=omnimix.BackboneConfig(**backbone), vocab_size=vocab_size, **options)
    model = omnimix.LanguageModel(config).eval()
    with torch.no_grad():
        # New weights give nearly flat logits, whose order means nothing.
        for p in model.parameters():
            p.mul_(2)
    return model


def wrapped(**options):
    model = language_model(**options)
    return model, hf.to_pretrained(model, end=BYTES.end)


def batch(side: str = "left") -> dict[str, torch.Tensor]:
    return dict(hf.to_tokenizer(BYTES)(TEXTS, return_tensors="pt", padding=True, padding_side=side))


def alone(model) -> list[torch.Tensor]:
    return [model(torch.tensor([BYTES.encode(text)]))[0][0] for text in TEXTS]


def test_it_imports_in_a_clone():
    """Python started there finds our folder `kernels` before Hugging Face's package of that name."""
    code = "import sys, omnimix as om; om.huggingface.AutoModelForCausalLM; print('kernels' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_the_answer(side):
    model, ours = wrapped()
    model, ours, inputs = model.double(), ours.double(), batch(side)
    output = ours(**inputs, use_cache=True, output_hidden_states=True)
    more = torch.tensor([[97, 98], [99, 100], [101, 102]])
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 2)], dim=1)
    after = ours(more, attention_mask=mask, past_key_values=output.past_key_values)
    for i, (text, logits) in enumerate(zip(TEXTS, alone(model), strict=True)):
        row = inputs["attention_mask"][i].bool()
        torch.testing.assert_close(output.logits[i, row], logits, rtol=0, atol=1e-12)
        whole = model(torch.tensor([BYTES.encode(text) + more[i].tolist()]))[0][0, -2:]
        torch.testing.assert_close(after.logits[i], whole, rtol=0, atol=1e-12)
    assert output.past_key_values.get_seq_length() == more.shape[1] + inputs["input_ids"].shape[1]
    embedded, first, last = output.hidden_states
    torch.testing.assert_close(model.logits(last), output.logits)
    assert embedded.shape == first.shape and not first[~inputs["attention_mask"].bool()].any()


def test_forward_keeps_the_logits_asked_for():
    _, ours = wrapped()
    inputs = batch()
    every = ours(**inputs).logits
    torch.testing.assert_close(ours(**inputs, logits_to_keep=1).logits, every[:, -1:])
    torch.testing.assert_close(ours(**inputs, logits_to_keep=torch.tensor([3, 17])).logits, every[:, [3, 17]])
    loss, logits = ours(inputs["input_ids"], labels=inputs["input_ids"], use_cache=False, return_dict=False)
    assert loss.ndim == 0 and logits.shape == every.shape


def test_greedy_search_is_ours():
    model, ours = wrapped()
    inputs = batch()
    expected = generate(model, [BYTES.encode(text) for text in TEXTS], GenerationConfig(max_new_tokens=10)).tokens
    length = inputs["input_ids"].shape[1]
    # Early ends are another test's: the rows are then filled up.
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    assert ours.generate(**inputs, **options)[:, length:].tolist() == expected
    assert ours.generate(**inputs, **options, use_cache=False)[:, length:].tolist() == expected
    embedded = ours.get_input_embeddings()(inputs["input_ids"])
    mask = inputs["attention_mask"]
    assert ours.generate(inputs_embeds=embedded, attention_mask=mask, **options).tolist() == expected
    straight = torch.tensor([BYTES.encode(TEXTS[1])])
    pieces = ours.generate(straight, **options, prefill_chunk_size=5)
    assert pieces[0, straight.shape[1] :].tolist() == expected[1]


def test_texts_end_where_ours_do():
    model, ours = wrapped()
    prompts = [BYTES.encode(text) for text in TEXTS]
    free = generate(model, prompts, GenerationConfig(max_new_tokens=10)).tokens
    end = free[0][3]
    expected = generate(model, prompts, GenerationConfig(max_new_tokens=10, end=end)).tokens
    assert len(expected[0]) <= 4
    found = ours.generate(**batch(), max_new_tokens=10, do_sample=False, eos_token_id=end, pad_token_id=256)
    for row, tokens in zip(found[:, batch()["input_ids"].shape[1] :].tolist(), expected, strict=True):
        assert row[: len(tokens)] == tokens and set(row[len(tokens) :]) <= {256}


@pytest.mark.parametrize("penalty", [1.0, 0.0])
def test_beam_search_is_ours(penalty):
    model, ours = wrapped()
    prompts = [BYTES.encode(text) for text in TEXTS]
    end = generate(model, prompts, GenerationConfig(max_new_tokens=6)).tokens[1][2]
    config = GenerationConfig(max_new_tokens=6, num_beams=3, end=end, length_penalty=penalty)
    expected = generate(model, prompts, config)
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "length_penalty": penalty}
    options |= {"eos_token_id": end, "pad_token_id": 256, "return_dict_in_generate": True, "output_scores": True}
    found = ours.generate(**batch(), **options)
    for row, tokens in zip(found.sequences[:, batch()["input_ids"].shape[1] :].tolist(), expected.tokens, strict=True):
        assert row[: len(tokens)] == tokens and set(row[len(tokens) :]) <= {256}
    torch.testing.assert_close(found.sequences_scores, torch.tensor(expected.scores))


FILTERS = [
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.3},
    {"temperature": 0.9, "repetition_penalty": 1.4, "top_k": 50, "top_p": 0.95, "min_p": 0.05},
]


@pytest.mark.parametrize("options", FILTERS, ids=["top_k", "top_p", "min_p", "all"])
def test_sampling_draws_from_our_distribution(options):
    """Generators differ, so what is compared is what each token was drawn from."""
    model, ours = wrapped()
    prompt = torch.tensor([BYTES.encode(TEXTS[1])])
    torch.manual_seed(1)
    theirs = ours.generate(
        prompt,
        max_new_tokens=5,
        do_sample=True,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_scores=True,
        **{"top_k": 0} | options,
    )
    config = GenerationConfig(max_new_tokens=5, **options)
    for i, scores in enumerate(theirs.scores):
        before = theirs.sequences[:, : prompt.shape[1] + i]
        seen = seen_tokens(before.tolist(), model.vocab_size, before.device)
        logits = filtered(model(before)[0][:, -1], config, seen)
        torch.testing.assert_close(scores.softmax(-1), logits.softmax(-1), rtol=1e-4, atol=1e-6)
        assert 1 < logits.isfinite().sum() <= model.vocab_size


def test_a_cache_goes_on_and_branches():
    model, ours = wrapped()
    first, second = BYTES.encode("one question"), BYTES.encode(" and another")
    cache = hf.OmnimixCache()
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    said = ours.generate(torch.tensor([first]), past_key_values=cache, **options)
    kept = copy.deepcopy(cache)
    whole = torch.cat([said, torch.tensor([second])], dim=1)
    expected = generate(model, whole.tolist(), GenerationConfig(max_new_tokens=4)).tokens[0]
    for states in (cache, kept):
        found = ours.generate(whole, past_key_values=states, **options)
        assert found[0, whole.shape[1] :].tolist() == expected
    assert cache.get_seq_length() == whole.shape[1] + 3 and cache.nbytes > 0
    cache.batch_repeat_interleave(2)
    assert len(cache.state["read"]) == 2
    with pytest.raises(UnsupportedCall, match="deepcopy"):
        cache.crop(3)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.state is None


@pytest.mark.parametrize("tie", [True, False])
def test_save_and_load(tie, tmp_path):
    model, ours = wrapped(tie_word_embeddings=tie)
    ours.save_pretrained(tmp_path)
    hf.to_tokenizer(BYTES).save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.language_model() == model.config
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (BYTES.vocab_size, 32, 2)
    assert config.tie_word_embeddings is tie and config.eos_token_id == BYTES.end
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is hf.OmnimixForCausalLM and not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name
    low = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert low(**batch()).logits.dtype == torch.bfloat16
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer(TEXTS)["input_ids"] == [BYTES.encode(text) for text in TEXTS]
    assert loaded.generation_config.eos_token_id == BYTES.end


def test_options_of_from_pretrained_are_transformers(tmp_path):
    model, ours = wrapped()
    ours.save_pretrained(tmp_path / "inner")
    load = hf.OmnimixForCausalLM.from_pretrained
    loaded = load(tmp_path, subfolder="inner", use_cache=False, output_hidden_states=True)
    assert not loaded.config.use_cache and loaded.config.output_hidden_states
    again, info = load(tmp_path / "inner", config=str(tmp_path / "inner"), output_loading_info=True)
    assert not info["missing_keys"] and torch.equal(again.model.embedding.weight, model.embedding.weight)


def test_memory_that_is_not_there_is_no_wrong_checkpoint(tmp_path, monkeypatch):
    _, ours = wrapped()
    ours.save_pretrained(tmp_path)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(full))
    with pytest.raises(torch.OutOfMemoryError):
        hf.OmnimixForCausalLM.from_pretrained(tmp_path)


def test_an_incomplete_checkpoint_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    _, ours = wrapped()
    ours.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.backbone.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="model.backbone.norm.weight"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


EXTRAS = {
    "ffn": MoEConfig(experts=4),
    "objective": CausalConfig(n_future=2, z_loss=1e-3),
}


def test_buffers_that_no_file_holds_start_anew(tmp_path):
    _, ours = wrapped(**EXTRAS)
    ours.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    hidden = [name for name, _ in loaded.named_buffers() if name not in loaded.state_dict()]
    assert hidden
    fresh = dict(hf.OmnimixForCausalLM(ours.config).named_buffers())
    for name, buffer in loaded.named_buffers():
        assert torch.equal(buffer, fresh[name]), name


def test_the_loss_is_ours():
    """With what experts and options add, for a batch that is padded at its ends."""
    model, ours = wrapped(**EXTRAS)
    model, ours, inputs = model.double().train(), ours.double().train(), batch("right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[1, :4] = -100
    counted = torch.ones_like(labels, dtype=torch.bool)
    counted[1, :4] = False
    lengths = inputs["attention_mask"].sum(1)
    packed = torch.cat([row[:n] for row, n in zip(inputs["input_ids"], lengths, strict=True)])[None]
    which = torch.cat([row[:n] for row, n in zip(counted, lengths, strict=True)])[None]
    borders = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    expected = model.loss(packed, cu_seqlens=borders, counted=which)
    expected.loss.backward()
    found = ours(**inputs, labels=labels)
    found.loss.backward()
    torch.testing.assert_close(found.loss, expected.loss)
    assert found.past_key_values is None
    for (name, p), q in zip(model.named_parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name)
    shared = ours(**inputs, labels=labels, num_items_in_batch=100).loss
    torch.testing.assert_close(shared, expected.loss * expected.count / 100)


def test_checkpointing_changes_no_gradient():
    _, ours = wrapped()
    ours.train()
    inputs = batch("right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    ours(**inputs, labels=labels).loss.backward()
    expected = {name: p.grad.clone() for name, p in ours.named_parameters()}
    ours.zero_grad()
    ours.activation_checkpointing_enable()
    assert ours.model.backbone.checkpointing and ours.is_activation_checkpointing
    ours(**inputs, labels=labels).loss.backward()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], msg=name)
    ours.activation_checkpointing_disable()
    assert not ours.model.backbone.checkpointing
    with pytest.raises(UnsupportedCall, match="every_n_layers"):
        ours.activation_checkpointing_enable(every_n_layers=2)


@pytest.mark.parametrize("tie", [True, False])
def test_tokens_can_be_added(tie, tmp_path):
    model, ours = wrapped(tie_word_embeddings=tie)
    before = ours(**batch()).logits
    ours.resize_token_embeddings(300)
    after = ours(**batch()).logits
    assert after.shape[-1] == 300 and ours.config.vocab_size == 300
    torch.testing.assert_close(after[..., : model.vocab_size], before)
    ours.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.model.vocab_size == 300
    torch.testing.assert_close(loaded(**batch()).logits, after)


def test_tokenizers_give_the_same_ids():
    trained = train_bpe(TEXTS * 5, 300, special=TURN)
    messages = [{"role": "user", "content": "hello é"}]
    for own in (BYTES, trained):
        theirs = hf.to_tokenizer(own)
        for text in (*TEXTS, "", "\x00\n\t ÿ 漢字 🙂  two", f"a{TURN[0]}b"):
            ids = own.encode(text, special=True)
            assert theirs(text)["input_ids"] == ids
            assert theirs.decode(ids, skip_special_tokens=True) == own.decode(ids)
        assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == own.chat(messages)
        assert (theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (own.end, own.end, own.vocab_size)


def test_a_template_keeps_its_own_first_token():
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "hello": 2}, unk_token="</s>"))
    inner.add_special_tokens(["<s>", "</s>"])
    template = "{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}"
    own = BPETokenizer(inner, template=template, variables={"bos_token": "<s>", "eos_token": "</s>"})
    messages = [{"role": "user", "content": "hello"}]
    theirs = hf.to_tokenizer(own)
    assert (theirs.bos_token, theirs.eos_token) == ("<s>", "</s>")
    assert theirs.apply_chat_template(messages, tokenize=False) == own.chat(messages) == "<s>hello</s>"


def test_a_run_becomes_a_model_of_transformers(tmp_path):
    model = language_model()
    save_model(model, tmp_path)
    BYTES.save(tmp_path)
    ours, tokenizer = hf.from_run(tmp_path)
    text = tokenizer(TEXTS[0], return_tensors="pt")
    torch.testing.assert_close(ours(**text).logits, model(text["input_ids"])[0])
    with pytest.raises(CheckpointError, match="not a run directory"):
        hf.from_run(tmp_path / "absent")


def test_what_cannot_be_served_says_so():
    _, ours = wrapped()
    inputs = batch("right")
    with pytest.raises(UnsupportedShape, match="padding_side"):
        ours.generate(**inputs, max_new_tokens=2)
    with pytest.raises(UnsupportedCall, match="cache_implementation"):
        ours.generate(inputs["input_ids"], max_new_tokens=2, cache_implementation="static")
    with pytest.raises(UnsupportedCall, match="output_attentions"):
        ours(inputs["input_ids"], output_attentions=True)
    with pytest.raises(UnsupportedShape, match="pass one"):
        ours()
    with pytest.raises(UnsupportedShape, match="row 1"):
        ours(inputs["input_ids"], attention_mask=torch.tensor([[1], [0], [1]]).expand(3, 19))
    with pytest.raises(UnsupportedShape, match="batch, time"):
        ours(inputs["input_ids"], attention_mask=torch.ones(3, 4))
    with pytest.raises(CheckpointError, match="omnimix"):
        hf.OmnimixForCausalLM(hf.OmnimixConfig())


def test_diffusion_is_refused_with_the_remedy():
    config = omnimix.LanguageModelConfig(
        backbone=omnimix.BackboneConfig(dim=32, depth=1, pattern=["attention"]), vocab_size=7, objective="masked"
    )
    model = omnimix.LanguageModel(config)
    with pytest.raises(UnsupportedCall, match="omnimix.diffuse"):
        hf.to_pretrained(model)


def test_shared_weights_are_saved_once_and_come_back_shared(tmp_path):
    pattern = (omnimix.backbones.BlockConfig(mixer="gla", tie="all"),)
    model, ours = wrapped(pattern=pattern)
    ours.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(list(again.parameters())) == len(list(model.parameters()))
    ids = torch.arange(9).view(1, 9)
    assert torch.equal(again(ids).logits, model(ids)[0])
