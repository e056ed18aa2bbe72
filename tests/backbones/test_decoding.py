"""Writing token by token: each sequence as it would be alone, and as the definitions say."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from omnimix.backbones.decoding import (
    GenerationConfig,
    Prefix,
    generate,
    load_prefix,
    read_prefix,
    save_prefix,
    stream,
)
from omnimix.backbones.decoding.generate import Writer
from omnimix.backbones.decoding.prefill import read
from omnimix.backbones.decoding.sampling import (
    distribution,
    draw,
    forbid,
    generator,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_repeats,
)
from omnimix.errors import CheckpointError, ConfigError, UnsupportedCall, UnsupportedShape

from .writers import END, PROMPTS, V, far, tiny

PATTERNS = [
    ["attention"],
    ["window"],
    ["gated_deltanet"],
    ["mamba2"],
    ["nsa"],
    ["moba", "hyena"],
    ["gated_deltanet", "attention+mamba2"],
]
patterns = pytest.mark.parametrize("pattern", PATTERNS, ids=",".join)


# Batches, pieces, streams


@patterns
def test_a_ragged_batch_is_each_alone(pattern):
    model = tiny(pattern)
    options = {"max_new_tokens": 8, "temperature": 0.9, "top_p": 0.95, "seed": 5}
    end = generate(model, PROMPTS, GenerationConfig(**options)).tokens[1][2]
    config = GenerationConfig(**options, end=end)
    together = generate(model, PROMPTS, config)
    assert len({len(t) for t in together.tokens}) > 1, "no sequence left the batch before the others"
    for i, prompt in enumerate(PROMPTS):
        alone = generate(model, [prompt], config, sample_ids=[i])
        assert alone.tokens[0] == together.tokens[i]
        assert alone.reasons[0] == together.reasons[i]
        assert far(alone.log_probs[0], together.log_probs[i]) < 1e-9
    pieces = generate(model, PROMPTS, GenerationConfig(**options, end=end, chunk=3))
    assert pieces.tokens == together.tokens
    assert all(map(lambda a, b: far(a, b) < 1e-9, pieces.log_probs, together.log_probs))


def test_a_sequence_may_leave_before_the_first_token():
    model, config = tiny(["attention"]), GenerationConfig(max_new_tokens=3)
    with torch.inference_mode():
        writer = Writer(model.eval(), PROMPTS, config)
        writer.leave({0})
        while writer.rows:
            writer.next()
    assert writer.written == [[], *generate(model, PROMPTS, config).tokens[1:]]


@patterns
def test_greedy_is_the_argmax_of_a_full_pass(pattern):
    model = tiny(pattern)
    found = generate(model, PROMPTS, GenerationConfig(max_new_tokens=6))
    for prompt, tokens, log_probs in zip(PROMPTS, found.tokens, found.log_probs, strict=True):
        with torch.no_grad():
            logits, _ = model(torch.tensor([prompt + tokens]))
        wanted = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert tokens == wanted.argmax(-1).tolist()
        assert far(log_probs, wanted.amax(-1).tolist()) < 1e-9


def test_a_stream_is_a_generation_and_may_be_left():
    model = tiny(["gated_deltanet", "attention"]).train()
    model.backbone.blocks[0].eval()
    modes = [m.training for m in model.modules()]
    config = GenerationConfig(max_new_tokens=8, temperature=1.0, seed=2)
    whole = generate(model, [PROMPTS[0]], config)
    steps = stream(model, torch.tensor(PROMPTS[0]), config)
    first = [next(steps).token for _ in range(3)]
    assert not torch.is_inference_mode_enabled()
    steps.close()
    assert first == whole.tokens[0][:3]
    assert [m.training for m in model.modules()] == modes
    steps = list(stream(model, PROMPTS[0], config))
    assert [s.token for s in steps] == whole.tokens[0]
    assert [s.reason for s in steps] == [None] * 7 + ["length"]
    assert whole.prompt_tokens == 9 and whole.new_tokens == 8


def test_dropped_tokens_do_not_matter():
    """Stochastic depth is off while text is written."""
    model = tiny(["mamba2"]).train()
    model.backbone.blocks[0].drop_path = 0.9
    runs = [generate(model, PROMPTS, GenerationConfig(max_new_tokens=4)).tokens for _ in range(2)]
    assert runs[0] == runs[1]


def test_a_state_stays_as_it_is_when_several_go_on_from_it():
    """Attention's cache has room for what follows, which only the first to go on may use."""
    model = tiny(["attention"])
    with torch.inference_mode():
        _, state = read(model, [[1, 2, 3]])
        kept = [t.clone() for t in state.tensors()]
        ways = {}
        for first in (4, 5):
            _, after = model(torch.tensor([[first]]), state)
            ways[first] = after
        # Both go on, in turn, and again from the first state.
        for second in (6, 7):
            for first, after in ways.items():
                logits, _ = model(torch.tensor([[second]]), after)
                wanted, _ = model(torch.tensor([[1, 2, 3, first, second]]))
                assert (logits[0, -1] - wanted[0, -1]).abs().max() < 1e-9
        assert all(torch.equal(a, b) for a, b in zip(kept, state.tensors(), strict=True))
    with torch.no_grad():
        logits, _ = model(torch.tensor([[8]]), ways[4])
        wanted, _ = model(torch.tensor([[1, 2, 3, 4, 8]]))
    assert (logits[0, -1] - wanted[0, -1]).abs().max() < 1e-9


def test_stop_sequences_and_the_end():
    model = tiny(["gla"])
    free = generate(model, PROMPTS, GenerationConfig(max_new_tokens=12)).tokens[0]
    stop = free[3:5]
    found = generate(model, PROMPTS, GenerationConfig(max_new_tokens=12, stop=[stop, [END, END, END, END, END]]))
    first = next(i for i in range(2, 13) if free[i - 2 : i] == stop)
    assert found.tokens[0] == free[:first] and found.reasons[0] == "stop"
    ended = generate(model, PROMPTS, GenerationConfig(max_new_tokens=12, end=free[4]))
    assert ended.tokens[0] == free[: free.index(free[4]) + 1] and ended.reasons[0] == "end"


def test_what_cannot_be_served_says_why():
    model = tiny(["gla"])
    for prompts, message in (([], "none"), ([[1], []], "number 1 is empty"), ([[1, V]], "tokenizer")):
        with pytest.raises(UnsupportedShape, match=message):
            generate(model, prompts)
    with pytest.raises(UnsupportedShape, match="2 for 1"):
        generate(model, [[1]], sample_ids=[0, 1])
    with pytest.raises(UnsupportedCall, match="num_beams=1"):
        stream(model, [1], GenerationConfig(num_beams=2))
    for ids in ([V], [-1], range(V)):
        with pytest.raises(ConfigError, match="forbidden"):
            generate(model, [[1]], GenerationConfig(forbidden=ids))
    model.objective.decoder = "diffusion"
    for call in (lambda: generate(model, [[1]]), lambda: stream(model, [1]), lambda: read_prefix(model, [1])):
        with pytest.raises(UnsupportedCall, match="diffuse"):
            call()


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_k": 0},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"stop": [[]]},
        {"num_beams": 2, "temperature": 1.0},
        {"chunk": 0},
    ],
    ids=str,
)
def test_configurations_that_cannot_work(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        GenerationConfig(**options)


# Filters and draws


def logits_of(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def kept(logits: torch.Tensor) -> list[int]:
    return logits[0].isfinite().nonzero()[:, 0].tolist()


def test_filters_keep_what_they_say():
    logits = logits_of(0.1, 0.4, 0.2, 0.3)
    assert kept(keep_top_k(logits, 2)) == [1, 3]
    assert kept(keep_top_k(logits, 9)) == [0, 1, 2, 3]
    assert kept(keep_top_k(logits_of(0.3, 0.3, 0.3, 0.1), 2)) == [0, 1, 2]
    for p, wanted in ((1e-9, [1]), (0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.71, [1, 2, 3]), (1.0, [0, 1, 2, 3])):
        assert kept(keep_top_p(logits, p)) == wanted
    for p, wanted in ((0.0, [0, 1, 2, 3]), (0.3, [1, 2, 3]), (0.6, [1, 3]), (1.0, [1])):
        assert kept(keep_min_p(logits, p)) == wanted
    assert kept(forbid(logits, [1, 2])) == [0, 3]
    seen = torch.tensor([[True, True, False, False]])
    found = penalise_repeats(torch.tensor([[2.0, -2.0, 2.0, -2.0]]), seen, 4.0)
    assert found.tolist() == [[0.5, -8.0, 2.0, -2.0]]


def test_filters_act_in_order():
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    seen = torch.rand(3, 30, generator=torch.Generator().manual_seed(1)) < 0.3
    config = GenerationConfig(
        temperature=1.7, top_k=12, top_p=0.8, min_p=0.05, repetition_penalty=1.3, forbidden=[int(logits[0].argmax())]
    )
    for row, marks, found in zip(logits, seen, distribution(logits, config, seen), strict=True):
        scores = {}
        for i, x in enumerate(row.tolist()):
            if i not in config.forbidden:
                x = x if not marks[i] else x / 1.3 if x > 0 else x * 1.3
                scores[i] = math.exp(x / 1.7)
        best = sorted(scores, key=scores.get, reverse=True)[:12]
        total, mass, nucleus = sum(scores[i] for i in best), 0.0, []
        for i in best:
            if mass < 0.8:
                nucleus.append(i)
            mass += scores[i] / total
        final = [i for i in nucleus if scores[i] >= 0.05 * scores[best[0]]]
        wanted = torch.zeros(30, dtype=torch.float64)
        wanted[final] = torch.tensor([scores[i] for i in final], dtype=torch.float64)
        assert (found - wanted / wanted.sum()).abs().max() < 1e-12
    greedy = distribution(logits, GenerationConfig(), None)
    assert torch.equal(greedy.argmax(-1), logits.argmax(-1)) and greedy.sum() == 3


def test_draws_have_the_distribution_and_a_seed():
    probabilities = torch.tensor([[0.5, 0.0, 0.2, 0.3]])
    source = generator(1, 2)
    n = 20_000
    drawn = draw(probabilities.expand(n, -1), [source] * n)
    share = drawn.bincount(minlength=4) / n
    error = (probabilities * (1 - probabilities) / n).sqrt()
    assert ((share - probabilities).abs() <= 3 * error).all()
    again = draw(probabilities.expand(9, -1), [generator(1, 2)] * 9)
    assert torch.equal(again, drawn[:9])
    assert not torch.equal(draw(probabilities.expand(n, -1), [generator(1, 3)] * n), drawn)


def test_seeds_decide():
    model = tiny(["gla"])

    def written(seed):
        return generate(model, [[1]] * 3, GenerationConfig(max_new_tokens=8, temperature=1.5, seed=seed)).tokens

    assert written(1) == written(1) != written(2)
    assert len({tuple(t) for t in written(1)}) > 1, "equal prompts drew the same"


def test_a_penalty_looks_at_the_prompt_and_what_was_written():
    model = tiny(["gla"])
    config = GenerationConfig(max_new_tokens=V - 2, repetition_penalty=1e9, forbidden=[0])
    tokens = generate(model, [[1]], config).tokens[0]
    # A seen token's logit is 0 or hugely negative; whatever is chosen twice had nothing positive beside it.
    with torch.no_grad():
        logits, _ = model(torch.tensor([[1, *tokens]]))
    for i, token in enumerate(tokens):
        before = {0, 1, *tokens[:i]}
        new = [j for j in range(V) if j not in before and logits[0, i, j] > 1e-6]
        assert not new or token == max(new, key=lambda j: logits[0, i, j])
    assert 0 not in tokens


# Prefixes


def test_a_prefix_is_the_beginning(tmp_path):
    model = tiny(["gated_deltanet", "attention+mamba2", "s4d"])
    config = GenerationConfig(max_new_tokens=5, temperature=1.0, repetition_penalty=1.2)
    prefix = read_prefix(model, [1, 2, 3, 4], chunk=3)
    assert isinstance(prefix, Prefix) and prefix.length == 4
    rest = [[5, 6], [], [7]]
    wanted = generate(model, [[1, 2, 3, 4, *r] for r in rest], config)
    save_prefix(tmp_path / "text.prefix", prefix, model)
    for start in (prefix, load_prefix(tmp_path / "text.prefix", model)):
        found = generate(model, rest, config, prefix=start)
        assert found.tokens == wanted.tokens
        assert all(map(lambda a, b: far(a, b) < 1e-9, found.log_probs, wanted.log_probs))
        assert [s.token for s in stream(model, [7], config, prefix=start, sample_id=2)] == wanted.tokens[2]
    assert generate(model, [[], []], config, prefix=prefix).tokens[1] == wanted.tokens[1]
    config = GenerationConfig(max_new_tokens=4, num_beams=3)
    wanted = generate(model, [[1, 2, 3, 4, *r] for r in rest], config)
    assert generate(model, rest, config, prefix=prefix).tokens == wanted.tokens


def test_prefixes_of_others_are_refused(tmp_path):
    model = tiny(["mamba2"])
    file = tmp_path / "text.prefix"
    save_prefix(file, read_prefix(model, [1, 2]), model)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.head.weight += 1e-6
    for other in (changed, tiny(["gla"]), model.float()):
        with pytest.raises(CheckpointError, match="other weights"):
            load_prefix(file, other)
    model = tiny(["mamba2"])
    assert load_prefix(file, model).tokens == [1, 2]
    content = file.read_bytes()
    for broken in (content[:-9], content[:20], b"", b"not a file of ours"):
        file.write_bytes(broken)
        with pytest.raises(CheckpointError, match="cannot read"):
            load_prefix(file, model)
    with pytest.raises(CheckpointError, match="cannot read"):
        load_prefix(tmp_path / "none", model)


def test_two_streams_of_a_model_in_training_do_not_disturb_each_other():
    model = tiny(["gated_deltanet"]).train()
    first = stream(model, PROMPTS[0], GenerationConfig(max_new_tokens=2))
    second = stream(model, PROMPTS[0], GenerationConfig(max_new_tokens=5))
    next(first)
    next(second)
    assert model.training
    list(first)
    with torch.no_grad():
        assert len(list(second)) == 4 and all(m.training for m in model.modules())
