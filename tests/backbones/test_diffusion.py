"""Diffusion objectives and samplers: their bounds against enumeration, and what every sampler keeps."""

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch

import omnimix as om
from omnimix.backbones.heads.block import BlockDiffusionConfig
from omnimix.backbones.heads.masked import MaskedConfig
from omnimix.errors import ConfigError, UnsupportedCall, UnsupportedShape

PATTERNS = {"attention": ["attention"], "gla": ["gla"], "hybrid": ["gated_deltanet", "attention"]}
FULL = om.Layout(causal=False)


def model(objective="masked", pattern="attention", *, vocab_size=11, scan="bidirectional", options=None, dim=16):
    """A model of float64 whose outputs differ from place to place, as those of fresh weights hardly do."""
    config = om.LanguageModelConfig(
        backbone=om.BackboneConfig(dim=dim, depth=2, pattern=PATTERNS[pattern], scan=scan),
        vocab_size=vocab_size,
        objective=objective if options is None else options,
        tie_word_embeddings=False,
    )
    made = om.LanguageModel(config).double()
    with torch.no_grad():
        for p in made.parameters():
            if p.ndim == 2:
                p.normal_(std=2.5 * p.shape[1] ** -0.5)
        made.embedding.weight.normal_()
    return made


def enumerated_bound(net, row, scored, token_cost, layout=FULL):
    """E over l uniform in 1 … L and over subsets of size l of (L/l) times the cost of the subset's tokens."""
    total = 0.0
    for size in range(1, len(scored) + 1):
        subsets = list(combinations(scored, size))
        for subset in subsets:
            hidden = row.clone()
            hidden[list(subset)] = net.mask_token
            logits = net(hidden[None], layout=layout)[0][0].detach()
            at = [i - net.objective.shift for i in subset]
            cost = sum(token_cost(logits[a], row[i]) for a, i in zip(at, subset, strict=True))
            total += cost / size / len(subsets)
    return total


def cross_entropy(logits, token):
    return -logits.log_softmax(-1)[token]


def score_entropy(logits, token):
    """Σ_y s_y − log s_token + (log 1 − 1) with the scores s_y = e^{z_y}/v, ratios to the true one."""
    scores = logits.exp() / len(logits)
    return scores.sum() - scores[token].log() - 1


BOUNDS = {
    "masked": ("attention", "masked", None, cross_entropy),
    "shifted": ("hybrid", "masked", MaskedConfig(shift=True), cross_entropy),
    "sedd": ("gla", "sedd", None, score_entropy),
}


@pytest.mark.parametrize("bound", BOUNDS)
def test_likelihood_agrees_with_enumeration(bound):
    pattern, objective, options, cost = BOUNDS[bound]
    net = model(objective, pattern, vocab_size=2, options=options)
    tokens = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 0]])
    lengths, counted = torch.tensor([4, 3]), torch.tensor([[True] * 4, [False, True, True, True]])
    found = net.objective.log_likelihood(net, tokens, lengths=lengths, counted=counted, samples=255, seed=3)
    assert found.samples == 256 and found.bound
    exact = [enumerated_bound(net, tokens[0], [1, 2, 3], cost), enumerated_bound(net, tokens[1, :3], [1, 2], cost)]
    for value, error, wanted in zip(found.nats, found.error, exact, strict=True):
        assert error > 0
        assert abs(value - wanted) < 3 * error
    alone = net.objective.log_likelihood(net, tokens[1:, :3], samples=256, seed=3)
    assert torch.allclose(alone.nats, found.nats[1:])
    # Training draws rates instead of counts; its mean has the same expectation.
    torch.manual_seed(1)
    losses = net.loss(tokens[:1].expand(2000, 4)).nats / 2000
    assert abs(losses - exact[0]) < 0.05 * exact[0]


def test_the_bound_is_that_of_any_order():
    """It is the mean over all orders of −log p of revealing one token after the other (LLaDA, arXiv 2502.09992)."""
    net = model(vocab_size=2)
    row = torch.tensor([0, 1, 0, 0])
    orders = [(a, b, c) for a in (1, 2, 3) for b in (1, 2, 3) for c in (1, 2, 3) if len({a, b, c}) == 3]
    total = 0.0
    for order in orders:
        hidden = row.clone()
        hidden[1:] = net.mask_token
        for i in order:
            total += cross_entropy(net(hidden[None], layout=FULL)[0][0, i].detach(), row[i]) / len(orders)
            hidden[i] = row[i]
    assert torch.allclose(total, enumerated_bound(net, row, [1, 2, 3], cross_entropy))


def test_losses_of_rows_padding_and_packing_agree():
    """With every token masked nothing is random but the weight, which stratified draws of one sequence share."""
    net = model(pattern="hybrid", options=MaskedConfig(eps=0.999999))
    rows = torch.randint(11, (2, 6))
    lengths, borders = torch.tensor([6, 4]), torch.tensor([0, 6, 10])
    packed = torch.cat([rows[0], rows[1, :4]])[None]
    padded = net.loss(rows, lengths=lengths)
    assert padded.count == 8
    assert torch.allclose(padded.nats, net.loss(packed, cu_seqlens=borders).nats, rtol=1e-5)
    alone = net.loss(rows[:1]).nats + net.loss(rows[1:, :4]).nats
    assert torch.allclose(padded.nats, alone, rtol=1e-5)
    given = torch.zeros(2, 6, dtype=torch.bool)
    given[0, 3] = True
    hidden = rows[:1].clone()
    hidden[0, 3] = net.mask_token
    wanted = cross_entropy(net(hidden, layout=FULL)[0][0, 3], rows[0, 3])
    assert torch.allclose(net.loss(rows, counted=given).nats, wanted, rtol=1e-5)
    with pytest.raises(UnsupportedShape, match="none is left"):
        net.loss(rows, counted=torch.zeros(2, 6, dtype=torch.bool))


def test_complementary_masks_predict_every_token():
    net = model(options=MaskedConfig(complementary=True))
    seen = []
    net.objective.token_nats = lambda model, y, targets: seen.append(targets) or y.sum(-1)
    tokens = torch.arange(11)[None]
    for arguments in ({}, {"cu_seqlens": torch.tensor([0, 11])}):
        net.loss(tokens, **arguments)
        assert sorted(seen.pop().tolist()) == list(range(1, 11))


@pytest.mark.parametrize(
    ("objective", "options"), [("masked", MaskedConfig(eps=0.0)), ("block", BlockDiffusionConfig(low=0.0, high=1e-6))]
)
def test_a_batch_in_which_nothing_is_masked_costs_nothing(objective, options):
    net = model(objective, options=options)
    losses = [net.loss(torch.randint(11, (1, 2))).loss for _ in range(8)]
    assert any(loss == 0 for loss in losses)
    for loss in losses:
        loss.backward()
    assert net.embedding.weight.grad is not None


GRADIENTS = {
    "masked": ("hybrid", "masked", None),
    "sedd": ("attention", "sedd", None),
    "block": ("hybrid", "block", BlockDiffusionConfig(block=5)),
    "block, shifted": ("gla", "block", BlockDiffusionConfig(block=4, shift=True)),
}


@pytest.mark.parametrize("case", GRADIENTS)
def test_a_gradient_reaches_every_parameter(case, without_gradient):
    pattern, objective, options = GRADIENTS[case]
    net = model(objective, pattern, options=options)
    assert without_gradient(net, lambda net: net.loss(torch.randint(11, (4, 12))).loss) == []


@pytest.mark.parametrize("objective", ["masked", "block", "sedd"])
def test_mixers_that_only_look_backwards_are_refused(objective):
    with pytest.raises(UnsupportedCall, match="GLA in layer 0 is not; configure scan='bidirectional'"):
        model(objective, "gla", scan="forward")


@pytest.mark.parametrize("case", ["hybrid", "gla, shifted"])
def test_the_likelihood_of_blocks_agrees_with_enumeration(case):
    pattern, _, shifted = case.partition(", ")
    net = model("block", pattern, vocab_size=2, options=BlockDiffusionConfig(block=3, shift=bool(shifted)))
    tokens = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 1, 0, 0]])
    lengths = torch.tensor([5, 4])
    found = net.objective.log_likelihood(net, tokens, lengths=lengths, samples=256, seed=1)
    layout = om.Layout(causal="block", block=3)
    for row, length, value, error in zip(tokens, [5, 4], found.nats, found.error, strict=True):
        exact = enumerated_bound(net, row[:3], [1, 2], cross_entropy, layout)
        exact += enumerated_bound(net, row[:length], list(range(3, length)), cross_entropy, layout)
        assert error > 0
        assert abs(value - exact) < 3 * error
    alone = net.objective.log_likelihood(net, tokens[1:, :4], samples=256, seed=1)
    assert torch.allclose(alone.nats, found.nats[1:])


@pytest.mark.parametrize("shift", [False, True], ids=["plain", "shifted"])
@pytest.mark.parametrize("pattern", ["gla", "hybrid"])
def test_blocks_of_one_token_are_autoregressive(pattern, shift):
    """The loss is −log p, the sum of each token's cost given those before it, whatever is drawn."""
    net = model("block", pattern, options=BlockDiffusionConfig(block=1, shift=shift))
    row = torch.randint(11, (6,))
    exact = 0.0
    for i in range(1, 6):
        seen = row[:i] if shift else torch.cat([row[:i], torch.tensor([net.mask_token])])
        logits = net(seen[None], layout=om.Layout(causal="block", block=1))[0][0, -1]
        exact += cross_entropy(logits.detach(), row[i])
    assert torch.allclose(net.loss(row[None]).nats, exact)
    found = net.objective.log_likelihood(net, row[None])
    assert (found.error, found.samples, found.bound) == (None, 0, False)
    assert torch.allclose(found.nats[0], exact)


@pytest.mark.parametrize("shift", [False, True], ids=["plain", "shifted"])
def test_block_losses_of_rows_padding_and_packing_agree(shift):
    net = model("block", "hybrid", options=BlockDiffusionConfig(block=3, low=0.9999999, shift=shift))
    rows = torch.randint(11, (3, 7))
    lengths, borders = torch.tensor([7, 4, 6]), torch.tensor([0, 7, 11, 17])
    packed = torch.cat([rows[0], rows[1, :4], rows[2, :6]])[None]
    given = torch.rand(3, 7) < 0.7
    kept = torch.arange(7) < lengths[:, None]
    losses = [
        net.loss(rows, lengths=lengths, counted=given),
        net.loss(packed, cu_seqlens=borders, counted=given[kept][None]),
    ]
    alone = [net.loss(rows[i : i + 1, :n], counted=given[i : i + 1, :n]) for i, n in enumerate(lengths.tolist())]
    assert losses[0].count == losses[1].count == sum(loss.count for loss in alone)
    assert torch.allclose(losses[0].nats, losses[1].nats)
    assert torch.allclose(losses[0].nats, sum(loss.nats for loss in alone))
    # The gradient flows through the state: what comes of it is that of one pass over clean and noisy copies.
    gradients = []
    for loss in losses:
        net.zero_grad()
        loss.loss.backward()
        gradients.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b) for a, b in zip(*gradients, strict=True))


def test_the_walk_equals_one_pass_over_clean_and_noisy_tokens():
    """For attention BD3-LM's mask (arXiv 2503.09573, section 3.2) over clean ‖ noisy says the same, gradients too."""
    net = model("block", options=BlockDiffusionConfig(block=3, low=0.9999999))
    tokens = torch.randint(11, (2, 8))
    net.loss(tokens).loss.backward()
    walked = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    total = 0.0
    for start in range(0, 8, 3):
        # Without a state: everything before a block is read again, clean, in front of it.
        noisy = tokens[:, : start + 3].clone()
        noisy[:, max(1, start) :] = net.mask_token
        logits, _ = net(noisy, layout=om.Layout(causal="block", block=3))
        for i in range(max(1, start), noisy.shape[1]):
            total = total - logits[:, i].log_softmax(-1).gather(1, tokens[:, i : i + 1]).sum()
    (total / 14).backward()
    assert all(torch.allclose(a, p.grad) for a, p in zip(walked, net.parameters(), strict=True))


SAMPLERS = {
    "one a step": om.DiffusionConfig(max_new_tokens=7),
    "all at once": om.DiffusionConfig(max_new_tokens=7, steps=1),
    "random": om.DiffusionConfig(max_new_tokens=7, steps=3, block=3, remask="random", temperature=1.0, seed=4),
    "threshold": om.DiffusionConfig(max_new_tokens=7, steps=5, block=4, remask="threshold", threshold=0.4),
    "ancestral": om.DiffusionConfig(max_new_tokens=7, steps=4, remask="ancestral", temperature=2.0, top_p=0.9),
    "end": om.DiffusionConfig(max_new_tokens=9, block=2, end=3, temperature=1.5),
    "infill only": om.DiffusionConfig(max_new_tokens=0, temperature=1.0),
}
CASES = {
    "masked": ("hybrid", "masked", None, SAMPLERS),
    "masked, shifted": ("gla", "masked", MaskedConfig(shift=True), ["threshold", "end"]),
    "sedd": ("attention", "sedd", None, ["ancestral"]),
    "block": ("hybrid", "block", BlockDiffusionConfig(block=3), [name for name in SAMPLERS if name != "one a step"]),
    "block, shifted": ("gla", "block", BlockDiffusionConfig(block=4, shift=True), ["threshold", "end", "infill only"]),
}


@pytest.mark.parametrize(("case", "sampler"), [(case, sampler) for case in CASES for sampler in CASES[case][3]])
def test_what_every_sampler_keeps(case, sampler):
    pattern, objective, options, _ = CASES[case]
    net, config = model(objective, pattern, options=options), SAMPLERS[sampler]
    mask = net.mask_token
    prompts = [[1, 2, mask, 5, mask, 0, 4], [4], [1, mask, mask]]
    shown = []
    together = om.diffuse(net, prompts, config, watch=shown.append)
    assert net.training
    for i, prompt in enumerate(prompts):
        whole, tokens = together.sequences[i], together.tokens[i]
        assert mask not in whole
        assert [a for a, b in zip(whole, prompt, strict=False) if b != mask] == [b for b in prompt if b != mask]
        assert whole == whole[: len(prompt)] + tokens
        assert together.reasons[i] == ("end" if config.end is not None and config.end in tokens else "length")
        assert (tokens[-1] == config.end) if together.reasons[i] == "end" else (len(tokens) == config.length)
        assert len(together.log_probs[i]) == len(tokens) and all(p < 0 for p in together.log_probs[i])
        alone = om.diffuse(net, [prompt], config, sample_ids=[i])
        assert (alone.sequences[0], alone.steps[0]) == (whole, together.steps[i])
    if objective == "block":
        again = om.diffuse(net, prompts, replace(config, cache=False))
        assert (again.sequences, again.steps) == (together.sequences, together.steps)
        for cached, plain in zip(together.log_probs, again.log_probs, strict=True):
            assert cached == pytest.approx(plain, abs=1e-9)
    assert len(shown) >= max(together.steps)
    for before, after in pairwise(shown):
        for old, new in zip(before, after, strict=True):
            assert all(a in (mask, b) for a, b in zip(old, new, strict=True))
    if config.steps is not None and config.block is None and objective != "block":
        assert max(together.steps) <= config.steps
    if config.remask == "low_confidence" and config.steps is None and config.end is None:
        hidden = [prompt.count(mask) + config.length for prompt in prompts]
        assert together.steps == hidden


def test_low_confidence_reveals_the_most_probable_token_first():
    net = model()
    canvas = [1, 4, *[net.mask_token] * 5]
    while net.mask_token in canvas:
        probabilities = net(torch.tensor([canvas]), layout=FULL)[0][0].softmax(-1)
        best = {i: probabilities[i].max() for i, token in enumerate(canvas) if token == net.mask_token}
        place = max(best, key=best.get)
        canvas[place] = int(probabilities[place].argmax())
    assert om.diffuse(net, [[1, 4]], om.DiffusionConfig(max_new_tokens=5)).sequences == [canvas]


def test_one_block_of_all_is_full_diffusion():
    masked = model(pattern="hybrid")
    block = model("block", "hybrid", options=BlockDiffusionConfig(block=64))
    block.load_state_dict(masked.state_dict())
    for options in ({}, {"steps": 4, "temperature": 1.0}):
        config = om.DiffusionConfig(max_new_tokens=9, **options)
        written = [om.diffuse(net, [[]], config) for net in (masked, block)]
        assert written[0].sequences == written[1].sequences
        assert written[0].log_probs[0] == pytest.approx(written[1].log_probs[0], abs=1e-9)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_converted_with_blocks_of_one_writes_as_the_autoregressive_model(pattern):
    net = model("causal", pattern, scan="forward")
    converted = om.convert(net, "block", BlockDiffusionConfig(block=1, shift=True))
    prompts = [[1, 2, 3, 4], [5]]
    written = om.diffuse(converted, prompts, om.DiffusionConfig(max_new_tokens=8))
    for prompt, found, log_probs in zip(prompts, written.sequences, written.log_probs, strict=True):
        tokens, wanted = list(prompt), []
        for _ in range(8):
            logits = net(torch.tensor([tokens]))[0][0, -1].detach()
            tokens.append(int(logits.argmax()))
            wanted.append(float(logits.log_softmax(-1).max()))
        assert found == tokens
        assert log_probs == pytest.approx(wanted, abs=1e-9)
    tokens = torch.randint(11, (2, 9))
    assert torch.allclose(converted.loss(tokens).loss, net.loss(tokens).loss)


def test_conversion_copies_weights_and_mask_annealing_opens_the_view():
    net = model("causal", "gla", scan="forward")
    both = om.convert(net, "masked")
    forward, backward = both.backbone.blocks[0].mixer.branches
    for old, a, b in zip(
        net.backbone.blocks[0].mixer.branches[0].parameters(), forward.parameters(), backward.parameters(), strict=True
    ):
        assert torch.equal(old, a) and torch.equal(old, b)
    assert torch.allclose(both.embedding.weight[11], net.embedding.weight.mean(0))

    # At step 0 attention sees what it did before: at rate 1 every token is predicted from the first alone.
    net = model("causal")
    options = MaskedConfig(shift=True, anneal_steps=10, eps=0.9999999)
    opened = om.convert(net, "masked", options)
    row = torch.randint(11, (1, 9))
    hidden = row.clone()
    hidden[0, 1:] = opened.mask_token
    for step, layout in [(0, om.Layout()), (5, om.Layout(causal="block", block=3)), (10, FULL), (99, FULL)]:
        opened.objective.anneal(step)
        logits = opened(hidden, layout=layout)[0][0, :-1].log_softmax(-1)
        wanted = -logits.gather(1, row[0, 1:, None]).sum()
        assert torch.allclose(opened.loss(row).nats, wanted)
    opened.objective.anneal(0)
    opened.eval()
    assert torch.allclose(opened.loss(row).nats, wanted)
    with pytest.raises(UnsupportedCall, match="set shift=True"):
        om.convert(net, "masked", MaskedConfig())
    with pytest.raises(ConfigError, match="options is a MaskedConfig; objective .sedd. takes a SeddConfig"):
        om.convert(net, "sedd", MaskedConfig(shift=True))
    with pytest.raises(UnsupportedCall, match="pass a causal model"):
        om.convert(opened)


def test_what_cannot_be_decoded_says_why(without_shape_checks):
    net = model()
    with pytest.raises(UnsupportedCall, match="cache=True: under objective 'masked' every token sees"):
        om.diffuse(net, [[1]], om.DiffusionConfig(cache=True))
    with pytest.raises(UnsupportedCall, match="call generate"):
        om.diffuse(model("causal", scan="forward"), [[1]])
    with pytest.raises(UnsupportedShape, match="begins with nothing known"):
        om.diffuse(model(options=MaskedConfig(shift=True)), [[]])
    with pytest.raises(ConfigError, match="remask is 'confident'"):
        om.DiffusionConfig(remask="confident")


def test_a_model_learns_a_pattern_and_writes_it():
    backbone = om.BackboneConfig(dim=32, depth=2, pattern=PATTERNS["hybrid"], scan="bidirectional")
    net = om.LanguageModel(om.LanguageModelConfig(backbone=backbone, vocab_size=6, objective="masked"))
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-2)
    cycle = torch.arange(24) % 5
    for _ in range(60):
        tokens = torch.stack([cycle[start : start + 12] for start in torch.randint(5, (16,))])
        optimiser.zero_grad()
        net.loss(tokens).loss.backward()
        optimiser.step()
    written = om.diffuse(net, [[3, 4], [0]], om.DiffusionConfig(max_new_tokens=10, steps=10))
    assert written.sequences == [cycle[3:15].tolist(), cycle[:11].tolist()]
