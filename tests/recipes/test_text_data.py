"""Text data: windows over packed documents, padded pieces, each held-out token once, resumed batches."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from omnimix.backbones import BackboneConfig
from omnimix.backbones.heads.noise import scored_tokens
from omnimix.errors import CheckpointError, ConfigError, UnknownName
from omnimix.modalities.data.token_cache import TokenCache
from omnimix.modalities.text.tokenizer import ByteTokenizer, train_bpe
from omnimix.recipes.text.data import ChatLines, JsonLines, Shards, StandardLibrary, TextFiles, TextOptions
from omnimix.recipes.text.recipe import TextGeneration
from omnimix.recipes.text.windows import PackedWindows, Pieces


@pytest.fixture
def folder(tmp_path):
    """Forty documents of 1 to about 230 bytes."""
    rng = np.random.default_rng(0)
    for i in range(40):
        letters = "".join(chr(c) for c in rng.integers(97, 123, int(rng.integers(1, 200))))
        (tmp_path / f"{i}.txt").write_text(f"{i} é {letters}\n")
    return tmp_path


def data(folder, **changes) -> TextFiles:
    given = {"tokenizer": "bytes", "length": 16, "batch_size": 4, "seed": 1, "val_fraction": 0.3}
    return TextFiles(path=str(folder), options=TextOptions(cache=str(folder / "cache"), **(given | changes)))


def batches(loader, epoch: int = 0) -> list[dict]:
    loader.set_epoch(epoch)
    return list(loader)


def sequences(batch) -> list[list[int]]:
    """The sequences of a batch, however they are given."""
    tokens = batch["tokens"]
    if "cu_seqlens" in batch:
        return [row.tolist() for row in tokens[0].split(batch["cu_seqlens"].diff().tolist())]
    lengths = batch.get("lengths", torch.full((len(tokens),), tokens.shape[1])).tolist()
    return [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]


def documents(module, *, held: bool) -> list[list[int]]:
    cache = module.cache
    chosen = np.flatnonzero(cache.held_out(module.options.val_fraction) == held)
    return [cache.tokens[cache.offsets[i] : cache.offsets[i + 1]].tolist() for i in chosen]


def test_each_held_out_token_is_scored_once(folder):
    module = data(folder)
    expected = documents(module, held=True)
    pieces = [s for batch in batches(module.val_dataloader()) for s in sequences(batch)]
    assert all(2 <= len(piece) <= 17 for piece in pieces)
    assert sum(len(piece) - 1 for piece in pieces) == sum(len(document) - 1 for document in expected)
    # Pieces joined at the token that two of them share give the documents again.
    found = []
    for document in expected:
        cut = [document[i : i + 17] for i in range(0, len(document) - 1, 16)]
        for piece in cut:
            pieces.remove(piece)
        found.append(cut)
    assert not pieces
    held = module.cache.held_out(0.3)
    sizes = [batch["bytes"] for batch in batches(module.val_dataloader())]
    assert sum(sizes) == module.test_set.bytes == int(module.cache.text_bytes[held].sum())


def test_validation_takes_long_pieces_first_and_fills_up_with_end_tokens(folder):
    module = data(folder)
    found = batches(module.val_dataloader())
    assert "lengths" not in found[0] and found[0]["tokens"].shape == (8, 17)
    ragged = [batch for batch in found if "lengths" in batch]
    assert ragged
    for batch in ragged:
        for row, length in zip(batch["tokens"], batch["lengths"], strict=True):
            assert (row[length:] == module.tokenizer.end).all()
    assert sum(len(batch["tokens"]) for batch in found) == len(module.val_set)


def test_validation_may_be_short_and_is_then_always_the_same(folder):
    whole = data(folder)
    short = data(folder, val_tokens=100)
    assert 100 <= short.val_set.tokens < 100 + 16 < whole.val_set.tokens
    assert np.array_equal(short.val_set.rows, data(folder, val_tokens=100, seed=9).val_set.rows)
    assert {tuple(row) for row in short.val_set.rows} <= {tuple(row) for row in whole.val_set.rows}
    assert short.test_set.tokens == whole.test_set.tokens == whole.val_set.tokens
    # The share of the bytes is that of the tokens.
    assert short.val_set.bytes == pytest.approx(100 * whole.val_set.bytes / whole.val_set.tokens, rel=0.2)


@pytest.mark.parametrize("epoch", [0, 1])
def test_packed_windows_score_each_token_once_and_respect_borders(folder, epoch):
    module = data(folder)
    text = documents(module, held=False)
    ring = [(i, j) for i, document in enumerate(text) for j in range(len(document))]
    dataset = module.train_set
    count = np.zeros(len(ring), int)
    at = {place: k for k, place in enumerate(ring)}
    start = None
    for index in range(len(dataset)):
        batch = dataset[(epoch, index)]
        row = batch["tokens"].flatten().tolist()
        borders = batch.get("cu_seqlens", torch.tensor([0, 17])).tolist()
        if start is None:
            letters = [text[i][j] for i, j in ring]
            [start] = [k for k in range(len(ring)) if (letters[k:] + letters[:k])[:17] == row]
        window = [ring[(start + 16 * index + n) % len(ring)] for n in range(17)]
        assert [text[i][j] for i, j in window] == row
        assert borders == sorted({0, 17, *(n for n, (_, j) in enumerate(window) if j == 0)})
        for a, b in pairwise(borders):
            for n in range(a + 1, b):
                count[at[window[n]]] += 1
    firsts = [k for k, (_, j) in enumerate(ring) if j == 0]
    assert count[firsts].sum() == 0 and count.max() == 1
    assert (count == 0).sum() - len(firsts) < 16 + 17


def test_batches_are_rows_or_packed(folder):
    module = data(folder)
    found = batches(module.train_dataloader())
    packed = [batch for batch in found if "cu_seqlens" in batch]
    assert 0 < len(packed) <= len(found)
    for batch in found:
        assert batch["tokens"].numel() == 4 * 17 and batch["tokens"].dtype == torch.int64
        assert sum(map(len, sequences(batch))) == 4 * 17
    # A document that is much longer than a window has none.
    cache = module.cache
    longest = np.array([np.diff(cache.offsets).argmax()])
    inside = PackedWindows(cache, longest, 4, seed=0)
    plain = [batch for i in range(len(inside)) if "cu_seqlens" not in (batch := inside[(0, i)])]
    assert plain and all(batch["tokens"].shape == (1, 5) for batch in plain)


def test_a_corpus_shorter_than_a_window_goes_round(folder):
    module = data(folder)
    cache = module.cache
    shortest = np.array([np.diff(cache.offsets).argmin()])
    [document] = [cache.tokens[cache.offsets[i] : cache.offsets[i + 1]].tolist() for i in shortest]
    dataset = PackedWindows(cache, shortest, 40, seed=0)
    assert len(dataset) == 1
    for sequence in sequences(dataset[(0, 0)])[1:-1]:
        assert sequence == document


def test_epochs_shift_and_shuffle(folder):
    module = data(folder)
    first, second = (batches(module.train_dataloader(), epoch) for epoch in (0, 1))
    assert not any(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(first, second, strict=True))
    again = batches(data(folder).train_dataloader(), 1)
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(second, again, strict=True))
    other = batches(data(folder, seed=2).train_dataloader(), 1)
    assert not torch.equal(other[0]["tokens"], second[0]["tokens"])


@pytest.mark.parametrize("boundaries", ["packed", "padded"])
@pytest.mark.parametrize("workers", [0, 1])
def test_resumed_within_an_epoch_the_batches_are_the_same(folder, boundaries, workers):
    module = data(folder, boundaries=boundaries)
    whole = batches(module.train_dataloader(), 3)
    loader = module.train_dataloader()
    loader.set_epoch(3)
    running = iter(loader)
    for _ in range(5):
        next(running)
    state = loader.state_dict()
    resumed = data(folder, boundaries=boundaries, workers=workers).train_dataloader()
    resumed.load_state_dict(state)
    rest = batches(resumed, 3)
    assert len(rest) == len(whole) - 5
    for a, b in zip(rest, whole[5:], strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


def test_padded_rows_hold_single_documents(folder):
    module = data(folder, boundaries="padded")
    text = documents(module, held=False)
    pieces = [s for batch in batches(module.train_dataloader()) for s in sequences(batch)]
    cuts = [document[i : i + 17] for document in text for i in range(0, len(document) - 1, 16)]
    # The loader leaves out a last batch that is not full.
    assert len(cuts) - 4 < len(pieces) <= len(cuts)
    for piece in pieces:
        cuts.remove(piece)


def test_bytes_of_training_batches_follow_the_tokens(folder):
    module = data(folder)
    total = sum(batch["bytes"] for batch in batches(module.train_dataloader()))
    held = module.cache.held_out(0.3)
    scored = int(np.diff(module.cache.offsets)[~held].sum() - (~held).sum())
    assert total == pytest.approx(int(module.cache.text_bytes[~held].sum()), rel=0.1)
    seen = sum(len(sequence) - 1 for batch in batches(module.train_dataloader()) for sequence in sequences(batch))
    assert scored == pytest.approx(seen, rel=0.1)


def test_the_tokenizer_is_learnt_loaded_or_bytes(folder, tmp_path):
    learnt = data(folder, tokenizer="bpe", vocab_size=300)
    assert 256 < learnt.vocab_size <= 300 and learnt.tokenizer.end == 0
    train_bpe(["abc " * 50], 260).save(tmp_path / "kept")
    loaded = data(folder, tokenizer=str(tmp_path / "kept"))
    assert loaded.vocab_size == 260
    with pytest.raises(UnknownName, match="'<stop>'"):
        _ = data(folder, tokenizer=str(tmp_path / "kept"), end="<stop>").tokenizer
    assert isinstance(data(folder).tokenizer, ByteTokenizer)
    with pytest.raises(CheckpointError, match="bpee does not exist"):
        _ = data(folder, tokenizer="bpee").vocab_size


def test_few_documents_fall_on_both_sides(folder, tmp_path, caplog):
    for part, held, side in ((1e-9, 1, "held out"), (1 - 1e-9, 39, "trained on")):
        with caplog.at_level("WARNING", "omnimix"):
            module = data(folder, val_fraction=part, tokenizer="bpe", vocab_size=270)
            assert module.cache.held_out(module.val_fraction).sum() == held and len(module.cache) == 40
        assert f"one is {side}" in caplog.text
        assert module.train_dataloader() and module.val_dataloader()
    only = tmp_path / "only"
    only.mkdir()
    (only / "a.txt").write_text("the only one\n" * 9)
    with pytest.raises(ConfigError, match="has 1 documents; .*--data.section 20000"):
        data(only).train_dataloader()


def test_split_and_options_are_checked(folder):
    for wrong in ({"length": 0}, {"batch_size": 0}):
        with pytest.raises(ConfigError, match=r"is 0; it must be at least 1"):
            data(folder, **wrong)
    with pytest.raises(ConfigError, match="val_fraction is 1.0"):
        TextOptions(val_fraction=1.0)
    with pytest.raises(ConfigError, match="val_tokens is 0"):
        TextOptions(val_tokens=0)


def test_unreadable_documents_are_named(folder):
    (folder / "bad.txt").write_bytes(b"\xff")
    module = data(folder)
    module.prepare_data()
    assert list(module.unreadable) == ["bad.txt"]


def test_json_lines_and_shards(folder, tmp_path):
    import io
    import tarfile

    rows = [json.dumps({"story": f"story number {i}"}) for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for i, row in enumerate(rows):
            info = tarfile.TarInfo(f"{i}.json")
            info.size = len(row)
            shard.addfile(info, io.BytesIO(row.encode()))
    options = TextOptions(val_fraction=0.3, cache=str(tmp_path / "cache"), tokenizer="bytes", length=8)
    for kind in (JsonLines, Shards):
        module = kind(path=str(tmp_path), field="story", options=options)
        module.setup("fit")
        assert len(module.cache) == 40 and module.val_set.tokens and len(module.train_set)


def test_conversations_train_on_the_answers(tmp_path):
    def row(i: int) -> str:
        messages = [{"role": "user", "content": "q" * 30}, {"role": "assistant", "content": f"answer {i}"}]
        return json.dumps({"messages": messages})

    (tmp_path / "a.jsonl").write_text("\n".join(row(i) for i in range(40)))
    options = TextOptions(val_fraction=0.3, cache=str(tmp_path / "cache"), tokenizer="bytes", length=16, batch_size=4)
    module = ChatLines(path=str(tmp_path), options=options)
    assert "<|im_start|>" in module.tokenizer.special
    module.setup("fit")
    scored = []
    for batch in batches(module.val_dataloader()):
        counted = batch["counted"].clone()
        counted[:, 0] = False
        # A piece without any answer is left out.
        assert counted.any(1).all()
        scored += batch["tokens"][counted].tolist()
    held = module.cache.held_out(0.3)
    assert len(scored) == int(module.cache.counted[np.repeat(held, np.diff(module.cache.offsets))].sum())
    assert module.val_set.bytes == int(module.cache.text_bytes[held].sum())
    text = module.tokenizer.decode(scored)
    assert "answer" in text and "q" not in text
    every = ChatLines(path=str(tmp_path), answers_only=False, options=options)
    every.setup("fit")
    assert "counted" not in every.val_set[(0, 0)] and every.val_set.bytes > module.val_set.bytes


def test_pieces_of_a_cache_without_documents_are_refused(folder):
    cache: TokenCache = data(folder).cache
    none = np.array([], int)
    with pytest.raises(ConfigError, match="of no document is a token left"):
        Pieces(cache, none, 8, fill=0)
    with pytest.raises(ConfigError, match="documents are none"):
        PackedWindows(cache, none, 8, seed=0)


@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_rows_that_only_fill_up_count_nothing(folder, kind):
    module = data(folder, borders=kind)
    alone, both = module.train_set[0, 3], module.train_set.__getitems__([(0, 3), (0, -1 - 5)])
    assert both["bytes"] == alone["bytes"] > 0
    scored = lambda batch: scored_tokens(*(batch.get(n) for n in ("tokens", "cu_seqlens", "lengths", "counted")))  # noqa: E731
    assert scored(both).sum() == scored(alone).sum()
    width = alone["tokens"].shape[1]
    assert both["counted"].flatten()[:width].any() and not both["counted"].flatten()[-width:].any()
    model = TextGeneration(
        backbone=BackboneConfig(dim=16, depth=1, pattern=("attention",)), vocab_size=module.vocab_size
    )
    model.on_validation_epoch_start()
    model.validation_step(module.train_set[0, -1 - 5], 0)
    assert model._sums == [0.0, 0, 0]


def test_conversations_are_always_padded(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    assert ChatLines(path=str(tmp_path), options=TextOptions(boundaries="padded")).options.boundaries == "padded"
    assert ChatLines(path=str(tmp_path)).options.length == StandardLibrary().options.length
    with pytest.raises(ConfigError, match=r"data.boundaries is 'packed'; for ChatLines it is always 'padded', since"):
        ChatLines(path=str(tmp_path), options=TextOptions(boundaries="packed"))
