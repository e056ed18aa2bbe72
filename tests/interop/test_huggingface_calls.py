"""transformers' calls of our models: stop strings, positions and packed batches, offloading and adapters."""

import pytest
import torch
from torch import nn

import omnimix
from omnimix.backbones import Layout, list_mixers
from omnimix.backbones.ffn.moe import MoEConfig
from omnimix.backbones.mixers import get_mixer
from omnimix.errors import UnsupportedCall, UnsupportedShape
from omnimix.modalities.text.chat import TURN
from omnimix.modalities.text.tokenizer import ByteTokenizer

transformers = pytest.importorskip("transformers")
hf = omnimix.huggingface

BYTES = ByteTokenizer(TURN)
TEXTS = ["hello", "a longer prompt, é", "x"]


def wrapped(pattern=("gated_deltanet", "attention"), ffn="swiglu", mixers=None, **options):
    torch.manual_seed(0)
    backbone = omnimix.BackboneConfig(dim=32, depth=2, pattern=list(pattern), ffn=ffn, mixers=mixers or {})
    config = omnimix.LanguageModelConfig(backbone=backbone, vocab_size=BYTES.vocab_size, **options)
    model = omnimix.LanguageModel(config).eval()
    with torch.no_grad():
        # New weights give nearly flat logits, whose order means nothing.
        for p in model.parameters():
            p.mul_(2)
    return model, hf.to_pretrained(model, end=BYTES.end)


def alone(model) -> list[torch.Tensor]:
    return [model(torch.tensor([BYTES.encode(text)]))[0][0] for text in TEXTS]


def test_texts_end_at_stop_strings():
    _, ours = wrapped()
    tokenizer, prompt = hf.to_tokenizer(BYTES), torch.tensor([BYTES.encode(TEXTS[1])])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    # Letters, which decode one by one.
    options["suppress_tokens"] = [i for i in range(BYTES.vocab_size) if not 65 <= i < 91]
    free = tokenizer.decode(ours.generate(prompt, **options)[0, prompt.shape[1] :])
    stop = free[3:5]
    found = ours.generate(prompt, **options, stop_strings=[stop], tokenizer=tokenizer)
    assert tokenizer.decode(found[0, prompt.shape[1] :]) == free[: free.index(stop) + len(stop)]


# One that looks positions up, and one that has a state only.
@pytest.mark.parametrize("pattern", [("attention",), ("gated_deltanet", "attention")])
def test_positions_that_restart_separate_sequences(pattern):
    model, ours = wrapped(pattern=pattern)
    model, ours = model.double(), ours.double()
    rows = [{"input_ids": BYTES.encode(text)} for text in TEXTS]
    flat = transformers.DataCollatorWithFlattening(return_tensors="pt")(rows)
    ids, labels = flat["input_ids"], flat.pop("labels")
    output = ours(**flat, labels=labels)
    torch.testing.assert_close(output.logits[0], torch.cat(alone(model)), rtol=0, atol=1e-12)
    assert output.past_key_values is None
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    boundaries = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    torch.testing.assert_close(output.loss, model.loss(ids, cu_seqlens=boundaries).loss)
    # Padding on either side, and two sequences in the same row as one.
    padded, mask = torch.full((2, 30), 5), torch.zeros(2, 30, dtype=torch.int64)
    positions = torch.ones(2, 30, dtype=torch.int64)
    for row, column, some in ((0, 3, rows[0]), (0, 8, rows[2]), (1, 0, rows[1])):
        own = torch.tensor(some["input_ids"])
        padded[row, column : column + len(own)] = own
        positions[row, column : column + len(own)] = torch.arange(len(own))
        mask[row, column : column + len(own)] = 1
    logits = ours(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits[mask.bool()]
    first, second, third = alone(model)
    torch.testing.assert_close(logits, torch.cat([first, third, second]), rtol=0, atol=1e-12)


def test_positions_are_those_that_are_given():
    model, ours = wrapped(pattern=("attention",))
    ids = torch.tensor([BYTES.encode(TEXTS[1])])
    gaps = torch.arange(ids.shape[1])[None] * 3
    context = omnimix.backbones.Context(Layout(), positions=gaps)
    torch.testing.assert_close(ours(ids, position_ids=gaps).logits, model(ids, layout=context)[0])
    plain = ours(ids).logits
    assert not torch.allclose(ours(ids, position_ids=gaps).logits, plain)
    torch.testing.assert_close(ours(ids, position_ids=gaps // 3 + 7).logits, plain)


def test_several_sequences_in_a_row_have_no_cache():
    _, ours = wrapped()
    ids, restart = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[0, 1, 0, 1]])
    cache = ours(ids, use_cache=True).past_key_values
    with pytest.raises(UnsupportedCall, match="position_ids"):
        ours(ids, position_ids=restart, past_key_values=cache)
    with pytest.raises(UnsupportedCall, match="position_ids"):
        ours(ids, cu_seq_lens_q=torch.tensor([0, 2, 4]))
    with pytest.raises(UnsupportedShape, match="position_ids"):
        ours(ids, position_ids=restart[:, :3])


def offload(model: nn.Module) -> None:
    """As accelerate's `cpu_offload`: the parameters of each module are on the device "meta" but while it is called."""
    for module in model.modules():
        held = {name: p.detach().clone() for name, p in module.named_parameters(recurse=False)}
        if not held:
            continue

        def forward(*given, own=module.forward, module=module, held=held, **options):
            for name, tensor in held.items():
                module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
            try:
                return own(*given, **options)
            finally:
                empty(module)

        module.forward = forward
        empty(module)


def empty(module: nn.Module) -> None:
    for name, p in module.named_parameters(recurse=False):
        module._parameters[name] = nn.Parameter(p.detach().to("meta"), requires_grad=False)


def accelerated(model: nn.Module) -> None:
    pytest.importorskip("accelerate").cpu_offload(model, execution_device="cpu", offload_buffers=True)


@pytest.mark.parametrize("how", [offload, accelerated])
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("mixer", list_mixers())
def test_offloaded_weights_give_the_same_answer(mixer, tie, how):
    ffn = MoEConfig(experts=4) if mixer == "gla" else "swiglu"
    _, ours = wrapped(pattern=(mixer,), tie_word_embeddings=tie, ffn=ffn, mixers={mixer: get_mixer(mixer).examples[0]})
    ids = torch.tensor([BYTES.encode(TEXTS[1])])

    def answers():
        with torch.no_grad():
            loss, logits = ours(ids, labels=ids, use_cache=False, return_dict=False)
            return loss, logits, ours.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)

    expected = answers()
    how(ours)
    assert all(p.is_meta for p in ours.model.backbone.parameters())
    for found, wanted in zip(answers(), expected, strict=True):
        torch.testing.assert_close(found, wanted)
