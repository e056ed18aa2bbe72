"""Language models with the causal objective: laws 2 and 3 for the whole, the loss, errors, files."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

from omnimix.backbones import BackboneConfig
from omnimix.backbones.heads.causal import CausalConfig
from omnimix.backbones.language import LanguageModel, LanguageModelConfig
from omnimix.backbones.mixers import get_mixer
from omnimix.cli.check_kernels import error, results
from omnimix.errors import UnsupportedCall, UnsupportedShape
from omnimix.modalities import load_model, save_model

VOCABULARY = 23
PATTERN = ("gated_deltanet", "mamba2", "attention")
LENGTHS = (2, 7, 3)
BORDERS = torch.tensor([0, 2, 9, 12], dtype=torch.int32)


def model(
    *, pattern=PATTERN, scan: str = "forward", tie: bool = True, ahead: int = 1, ffn: str = "swiglu"
) -> LanguageModel:
    mixers = {name: get_mixer(name).examples[0] for entry in pattern for name in entry.split("+")}
    backbone = BackboneConfig(dim=32, depth=len(pattern), pattern=pattern, mixers=mixers, scan=scan, ffn=ffn)
    return LanguageModel(
        LanguageModelConfig(
            backbone=backbone,
            vocab_size=VOCABULARY,
            tie_word_embeddings=tie,
            objective=CausalConfig(n_future=ahead),
        )
    )


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(0))


class _Loss(torch.nn.Module):
    """The loss as a forward, for functional_call."""

    def __init__(self, inner: LanguageModel):
        super().__init__()
        self.inner = inner

    def forward(self, tokens, **options):
        return self.inner.loss(tokens, **options)


@pytest.mark.parametrize("lengths", [(1, 8), (4, 3, 2), (1,) * 9], ids=str)
def test_law_2_pieces_are_the_whole(lengths: tuple[int, ...]):
    net = model().double()
    tokens = ids(2, sum(lengths))

    def leaves(state):
        return [t for t in state.tensors() if t.is_floating_point()]

    def whole(**parameters):
        logits, state = functional_call(net, parameters, (tokens,))
        return (logits, *leaves(state))

    def in_pieces(**parameters):
        parts, state = [], net.init_state(2, dtype=torch.float64)
        for piece in tokens.split(list(lengths), dim=1):
            logits, state = functional_call(net, parameters, (piece, state))
            parts.append(logits)
        return (torch.cat(parts, dim=1), *leaves(state))

    given = dict(net.named_parameters())
    found, wanted = results(in_pieces, given).named(), results(whole, given).named()
    assert found.keys() == wanted.keys()
    assert max(error(found[name], wanted[name]) for name in wanted) < 1e-9


def test_law_3_the_loss_of_packed_sequences_is_the_mean_over_each_alone():
    net = _Loss(model().double())
    packed = ids(1, 12)

    def together(**parameters):
        found = functional_call(net, parameters, (packed,), {"cu_seqlens": BORDERS})
        assert found.count == 12 - len(LENGTHS)
        return (found.loss,)

    def each_alone(**parameters):
        rows = [functional_call(net, parameters, (row,)) for row in packed.split(list(LENGTHS), dim=1)]
        return (sum(row.loss * row.count for row in rows) / sum(row.count for row in rows),)

    given = dict(net.named_parameters())
    found, wanted = results(together, given).named(), results(each_alone, given).named()
    assert max(error(found[name], wanted[name]) for name in wanted) < 1e-9


def test_rows_filled_up_at_their_ends_are_packed_sequences():
    net = model(ahead=3).double()
    packed = ids(1, 12)
    padded = torch.nn.utils.rnn.pad_sequence(packed[0].split(list(LENGTHS)), batch_first=True)
    found, wanted = net.loss(padded, lengths=torch.tensor(LENGTHS)), net.loss(packed, cu_seqlens=BORDERS)
    assert found.count == wanted.count
    assert error(found.loss, wanted.loss) < 1e-9 and error(found.nats, wanted.nats) < 1e-9
    with pytest.raises(UnsupportedCall, match="pass one of them"):
        net.loss(packed, cu_seqlens=BORDERS, lengths=torch.tensor([12]))


def test_the_loss_is_what_the_logits_say():
    net = model().double()
    tokens, counted = ids(2, 9), torch.arange(9).expand(2, 9) >= 4
    likely = net(tokens)[0][:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    found = net.loss(tokens, counted=counted)
    assert found.count == 10
    assert error(found.nats, -likely[:, 3:].sum()) < 1e-9
    assert error(found.loss * found.count, found.nats) < 1e-9
    lengths = torch.tensor([9, 6])
    score = net.objective.log_likelihood(net, tokens, lengths=lengths)
    assert error(score.nats, -torch.stack([likely[0].sum(), likely[1, :5].sum()])) < 1e-9


def test_a_greedy_continuation_is_known_as_one():
    net = model().double()
    tokens = ids(2, 3)
    for _ in range(4):
        tokens = torch.cat([tokens, net(tokens)[0][:, -1:].argmax(-1)], dim=1)
    counted = (torch.arange(7) >= 3).expand(2, 7)
    assert net.objective.log_likelihood(net, tokens, counted=counted).greedy.tolist() == [True, True]
    tokens[1, 5] = (tokens[1, 5] + 1) % VOCABULARY
    assert net.objective.log_likelihood(net, tokens, counted=counted).greedy.tolist() == [True, False]


@pytest.mark.parametrize("bad", [-1, VOCABULARY])
def test_ids_outside_the_vocabulary_are_refused(bad: int):
    tokens = ids(1, 5)
    tokens[0, 2] = bad
    with pytest.raises(UnsupportedShape, match=rf"{bad}.*0 to {VOCABULARY - 1}; is this its tokenizer"):
        model().loss(tokens)


def test_no_tokens_leave_the_state_as_it_is():
    net = model()
    _, state = net(ids(2, 4))
    logits, after = net(ids(2, 0), state)
    assert logits.shape == (2, 0, VOCABULARY)
    assert all(torch.equal(a, b) for a, b in zip(after.tensors(), state.tensors(), strict=True))
    logits, fresh = net(ids(2, 0))
    assert [t.shape for t in fresh.tensors()] == [t.shape for t in net.init_state(2).tensors()]


def test_what_is_no_batch_of_tokens_is_refused(without_shape_checks):
    with pytest.raises(UnsupportedShape, match="is not"):
        model()(ids(4))


def test_mixers_that_look_both_ways_are_refused():
    with pytest.raises(UnsupportedCall, match=r"GatedDeltaNet in layer 0 .*scan='forward'"):
        model(scan="bidirectional")
    with pytest.raises(UnsupportedCall, match=r"GLA in layer 1 .*scan='forward'"):
        model(pattern=("attention", "attention+gla"), scan="bidirectional")


def test_a_batch_without_a_scored_token_is_refused():
    net = model()
    with pytest.raises(UnsupportedShape, match=r"\(2, 1\) none is left"):
        net.loss(ids(2, 1))
    with pytest.raises(UnsupportedShape, match="none is left"):
        net.loss(ids(2, 4), counted=torch.zeros(2, 4, dtype=torch.bool))


def test_a_gradient_reaches_everything_tokens_ahead_included(without_gradient):
    net = model(ahead=3, tie=False)
    assert without_gradient(net, lambda net: net.loss(ids(2, 9)).loss) == []
    assert net.loss(ids(2, 9)).parts.keys() == {"next", "n_future"}


def test_sequences_too_short_for_the_tokens_ahead_have_a_finite_loss():
    found = model(ahead=3).loss(ids(2, 2))
    found.loss.backward()
    assert found.count == 2 and found.loss.isfinite()


def test_the_head_is_the_embedding_unless_untied():
    tied, untied = model(), model(tie=False)
    assert tied.head.weight is tied.embedding.weight
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 23 * 32
    assert untied.head.weight.shape == untied.embedding.weight.shape
    untied.load_state_dict(tied.state_dict() | {"head.weight": tied.embedding.weight + 1.0})
    y = torch.randn(2, 32)
    assert error(untied.logits(y), tied.logits(y) + y.sum(-1, keepdim=True)) < 1e-5


@pytest.mark.parametrize("tie", [True, False])
def test_a_model_comes_back_from_its_files(tie: bool, tmp_path):
    net = model(tie=tie, ahead=2)
    save_model(net, tmp_path)
    again = load_model(tmp_path)
    assert again.config == net.config
    assert torch.equal(again(ids(2, 6))[0], net.eval()(ids(2, 6))[0])


def test_the_loss_trains_under_autocast():
    net = model(ffn="moe", ahead=2)
    full = net.loss(ids(2, 40)).loss
    with torch.autocast("cpu", torch.bfloat16):
        found = net.loss(ids(2, 40)).loss
    found.backward()
    assert found.dtype == torch.float32 and error(found, full) < 0.02
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
