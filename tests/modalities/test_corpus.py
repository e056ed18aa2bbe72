"""Corpora and the cache of their tokens: every source, broken ones too, the split, kills and corruption."""

import gzip
import io
import json
import multiprocessing
import os
import pickle
import signal
import sys
import tarfile

import numpy as np
import pytest

from omnimix.errors import CheckpointError, ConfigError, MediaError, MissingPackage
from omnimix.modalities.data import corpus as corpora
from omnimix.modalities.data.corpus import JsonLines, Shards, TextFiles, held_out
from omnimix.modalities.data.token_cache import TokenCache, cached_bpe, cached_tokens, text_cache, write_tokens
from omnimix.modalities.text.chat import TURN
from omnimix.modalities.text.tokenizer import ByteTokenizer
from omnimix.utils import log


def texts(corpus) -> list[str]:
    return [document.text for document in corpus]


@pytest.fixture
def folder(tmp_path):
    """Twelve text files, among them an empty one and one that is not UTF-8."""
    root = tmp_path / "text"
    (root / "sub").mkdir(parents=True)
    for i in range(10):
        (root / "sub" / f"{i}.txt").write_text(f"text number {i}, naïve\n" * (i + 1))
    (root / "empty.txt").write_text("")
    (root / "latin.txt").write_bytes("né".encode("latin-1"))
    (root / ".hidden").mkdir()
    (root / ".hidden" / "x.txt").write_text("hidden")
    return root


def test_folders_are_read_in_order_and_broken_files_counted(folder):
    corpus = TextFiles(folder)
    documents = list(corpus)
    assert [d.name for d in documents] == ["empty.txt", *(f"sub/{i}.txt" for i in range(10))]
    assert documents[2].text == "text number 1, naïve\n" * 2
    assert list(corpus.problems) == ["latin.txt"] and "utf-8" in corpus.problems["latin.txt"]
    assert list(corpus) == documents and len(corpus.problems) == 1
    with pytest.raises(MediaError, match="latin.txt cannot be read.*policy 'skip'"):
        list(TextFiles(folder, policy="raise"))


def test_missing_and_unfitting_files_are_refused(folder):
    with pytest.raises(ConfigError, match="no such file or folder"):
        TextFiles(folder / "none")
    with pytest.raises(ConfigError, match=r"no file .* fits the patterns \*.md; it holds files in .txt"):
        TextFiles(folder, patterns=["*.md"])


def test_sections_cut_files_at_lines(folder):
    file = folder / "sub" / "9.txt"
    documents = list(TextFiles(file, section=50))
    assert "".join(d.text for d in documents) == file.read_text()
    assert len(documents) == 4 and all(d.text.endswith("\n") and len(d.text) >= 50 for d in documents[:-1])
    assert len({d.key for d in documents}) == 4


def test_the_standard_library_is_there():
    corpus = corpora.standard_library()
    names = [name for name, _ in corpus.files]
    assert {"os.py", "json/decoder.py"} <= set(names) and len(names) > 300
    assert not [name for name in names if "-packages" in name or "__pycache__" in name]
    assert names == sorted(names) and corpus.nbytes > 5e6


def test_json_lines(tmp_path):
    file = tmp_path / "a.jsonl"
    lines = ['{"text": "one"}', "", "{broken", '{"other": 1}', "3", '{"text": "\\ud800"}', '{"text": "two"}']
    file.write_text("\n".join(lines))
    corpus = JsonLines(file)
    assert texts(corpus) == ["one", "two"]
    assert sorted(corpus.problems) == [f"a.jsonl:{i}" for i in (3, 4, 5, 6)]
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(file.read_bytes()))
    assert texts(JsonLines(tmp_path)) == ["one", "two"] * 2
    assert texts(JsonLines(file, field="other")) == []


def test_a_truncated_gzip_file_is_counted(tmp_path):
    rows = "".join(json.dumps({"text": np.random.default_rng(i).bytes(2000).hex()}) + "\n" for i in range(50))
    whole = gzip.compress(rows.encode())
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    corpus = JsonLines(tmp_path)
    assert 0 < len(texts(corpus)) < 50
    assert list(corpus.problems) == ["a.jsonl.gz"]


def test_rows_are_split_by_their_content(tmp_path):
    rows = [json.dumps({"text": f"row {i}"}) for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    (tmp_path / "b.jsonl").write_text("\n".join(["", *rows[::-1]]))
    a, b = ({d.text: d.key for d in JsonLines(tmp_path / name)} for name in ("a.jsonl", "b.jsonl"))
    assert a == b and len(set(a.values())) == 40


def write_tar(path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as shard:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))


def test_shards(tmp_path):
    members = {"0.txt": b"zero", "1.json": b'{"text": "one"}', "2.jpg": b"\xff", "3.txt": b"\xff", "4.json": b"{"}
    write_tar(tmp_path / "a.tar", members)
    corpus = Shards(tmp_path)
    assert texts(corpus) == ["zero", "one"]
    assert sorted(corpus.problems) == ["a.tar/3.txt", "a.tar/4.json"]


@pytest.mark.parametrize("size", [512 + 300, 1024, 1024 + 300, 1024 + 512 + 300])
def test_truncated_shards_are_counted(tmp_path, size):
    write_tar(tmp_path / "a.tar", {"0.txt": b"a" * 512, "1.txt": b"b" * 512})
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:size])
    corpus = Shards(tmp_path)
    assert texts(corpus) == ["a" * 512] * (size >= 1024)
    assert list(corpus.problems) == ["a.tar"]
    with pytest.raises(MediaError, match="a.tar"):
        list(Shards(tmp_path, policy="raise"))


def test_what_webdataset_writes_is_read(tmp_path):
    from webdataset import ShardWriter

    with ShardWriter(str(tmp_path / "%04d.tar"), maxcount=2, verbose=0) as writer:
        for i in range(3):
            writer.write({"__key__": f"{i}", "txt": f"text {i}"})
    corpus = Shards(tmp_path)
    assert texts(corpus) == ["text 0", "text 1", "text 2"] and not corpus.problems


def test_parquet_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingPackage, match=r"'\.\[parquet\]'"):
        corpora.Parquet(tmp_path)


def test_parquet(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    chats = [[{"role": "user", "content": str(i)}] for i in range(3)]
    parquet.write_table(arrow.table({"text": ["one", None, "two"], "chat": chats}), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[:-30])
    corpus = corpora.Parquet(tmp_path)
    assert texts(corpus) == ["one", "two"] and sorted(corpus.problems) == ["a.parquet:2", "b.parquet"]
    assert [d.messages for d in corpora.Parquet(tmp_path, field="chat", chat=True)] == chats
    corpus = corpora.Parquet(tmp_path / "a.parquet", field="words")
    assert not texts(corpus) and "no column 'words', but text, chat" in corpus.problems["a.parquet"]


def test_the_split_depends_on_the_key_alone():
    keys = [f"folder/{i}.py" for i in range(4000)]
    held = {key for key in keys if held_out(key, 0.1)}
    assert 330 < len(held) < 470
    assert held == {key for key in reversed(keys) if held_out(key, 0.1)}
    # A larger part holds out what a smaller one does, and more.
    assert held <= {key for key in keys if held_out(key, 0.2)}
    # Fixed for good: trained models must meet the same held-out files in every later version.
    assert [i for i in range(60) if held_out(keys[i], 0.1)] == [2, 31, 32, 41, 50, 56, 57]


def test_the_cache_holds_every_document(folder, tmp_path):
    tokenizer = ByteTokenizer()
    corpus = TextFiles(folder)
    cache = cached_tokens(corpus, tokenizer, folder=tmp_path / "cache")
    documents = [d for d in corpus if d.text]
    assert len(cache) == len(documents) == 10 and cache.tokens.dtype == np.uint16
    for i, document in enumerate(documents):
        ids = cache.tokens[cache.offsets[i] : cache.offsets[i + 1]].tolist()
        assert ids == tokenizer.document(document.text)
        assert cache.text_bytes[i] == len(document.text.encode())
    assert cache.held_out(0.3).tolist() == [held_out(d.key, 0.3) for d in documents]
    assert list(cache.problems) == ["latin.txt"] and cache.counted is None
    again = pickle.loads(pickle.dumps(cache))
    assert np.array_equal(again.tokens, cache.tokens) and isinstance(again.tokens, np.memmap)


def test_the_cache_is_used_until_something_changes(folder, tmp_path, monkeypatch):
    place = tmp_path / "cache"
    cache = cached_tokens(TextFiles(folder), ByteTokenizer(), folder=place)
    assert cached_tokens(TextFiles(folder), ByteTokenizer(), folder=place).file == cache.file
    with monkeypatch.context() as patch:
        patch.setattr(TextFiles, "_read", None)  # would fail where it is called
        cached_tokens(TextFiles(folder), ByteTokenizer(), folder=place)
    others = [
        cached_tokens(TextFiles(folder), ByteTokenizer(["<x>"]), folder=place),
        cached_tokens(TextFiles(folder, section=50), ByteTokenizer(), folder=place),
    ]
    (folder / "empty.txt").write_text("no longer")
    others.append(cached_tokens(TextFiles(folder), ByteTokenizer(), folder=place))
    assert len({cache.file, *(other.file for other in others)}) == 4
    assert len(others[-1]) == 11
    with pytest.raises(MediaError, match="latin.txt"):
        cached_tokens(TextFiles(folder, policy="raise"), ByteTokenizer(), folder=place)


def test_a_corrupt_cache_is_never_read_and_written_anew(folder, tmp_path):
    corpus, tokenizer = TextFiles(folder), ByteTokenizer()
    file = cached_tokens(corpus, tokenizer, folder=tmp_path).file
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[100] ^= 1
    other_footer = whole[:-20] + b"\xff" * 4 + whole[-16:]
    for broken in (b"", whole[:-1], whole[: len(whole) // 2], bytes(flipped), whole[1:], other_footer):
        file.unlink()
        file.write_bytes(broken)
        with pytest.raises(CheckpointError):
            TokenCache(file)
        cached_tokens(corpus, tokenizer, folder=tmp_path)
        assert file.read_bytes() == whole


def killed_while_writing(folder, file) -> None:
    def kill(document) -> None:
        if document.name == "sub/5.txt":
            os.kill(os.getpid(), signal.SIGKILL)

    write_tokens(file, TextFiles(folder), ByteTokenizer(), seen=kill)


def test_a_kill_while_writing_leaves_the_old_cache(folder, tmp_path):
    file = tmp_path / "tokens.bin"
    (folder / "sub" / "5.txt").rename(folder / "sub" / "5.old")
    write_tokens(file, TextFiles(folder), ByteTokenizer())
    before = file.read_bytes()
    (folder / "sub" / "5.old").rename(folder / "sub" / "5.txt")
    job = multiprocessing.get_context("fork").Process(target=killed_while_writing, args=(folder, file))
    job.start()
    job.join()
    assert job.exitcode == -signal.SIGKILL
    assert file.read_bytes() == before
    left = [p for p in tmp_path.iterdir() if p.suffix == ".part"]
    assert len(left) == 1
    # What was left behind is removed a day later.
    os.utime(left[0], (0, 0))
    cached_tokens(TextFiles(folder), ByteTokenizer(), folder=tmp_path)
    assert not left[0].exists()


def test_two_processes_at_once_do_no_harm(folder, tmp_path):
    context = multiprocessing.get_context("fork")
    jobs = [
        context.Process(target=cached_tokens, args=(TextFiles(folder), ByteTokenizer()), kwargs={"folder": tmp_path})
        for _ in range(4)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0] * 4
    assert sorted(p.suffix for p in tmp_path.glob("*.*")) == [".bin", ".lock"]
    assert len(cached_tokens(TextFiles(folder), ByteTokenizer(), folder=tmp_path)) == 10


def test_a_cache_that_cannot_be_written_is_reported(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written.*choose another folder"):
        cached_tokens(TextFiles(folder), ByteTokenizer(), folder=tmp_path / "file" / "cache")


def test_a_command_shows_how_far_it_is_on_a_terminal_alone(folder, tmp_path, monkeypatch, capsys):
    with log.printed():
        cached_tokens(TextFiles(folder), ByteTokenizer(), folder=tmp_path / "a")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with log.printed():
        cached_tokens(TextFiles(folder), ByteTokenizer(), folder=tmp_path / "b")
    assert "reading text into tokens" in capsys.readouterr().err
    cached_tokens(TextFiles(folder), ByteTokenizer(), folder=tmp_path / "c")
    assert capsys.readouterr() == ("", "")


def test_what_is_read_is_logged(folder, tmp_path, caplog):
    caplog.set_level("DEBUG", "omnimix")
    cached_tokens(TextFiles(folder), ByteTokenizer(), folder=tmp_path)
    assert "reading text into tokens" in caplog.messages


def test_a_corpus_without_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="has no text: a.txt: UnicodeDecodeError"):
        cached_tokens(TextFiles(tmp_path), ByteTokenizer(), folder=tmp_path)


def test_conversations_score_the_answers(tmp_path):
    good = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Né"}]
    rows = [good, [{"role": "assistant", "content": "first"}], "text", [{"role": "user"}]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    corpus = JsonLines(tmp_path, field="messages", chat=True)
    tokenizer = ByteTokenizer(TURN)
    cache = cached_tokens(corpus, tokenizer, folder=tmp_path, answers_only=True)
    ids, counted = tokenizer.chat_document(good)
    assert cache.tokens.tolist() == ids and cache.counted.tolist() == counted
    assert cache.text_bytes.tolist() == [3] and len(cache.problems) == 3
    whole = cached_tokens(corpus, tokenizer, folder=tmp_path)
    assert whole.counted is None and len(whole) == 2


def test_bpe_learns_from_what_is_not_held_out(folder, tmp_path):
    corpus = TextFiles(folder)
    held = [d for d in corpus if held_out(d.key, 0.5) and d.text]
    assert held and len(held) < 10
    (folder / "sub" / held[0].name.removeprefix("sub/")).write_text("zzzzzzzz" * 100)
    tokenizer = cached_bpe(corpus, 300, val_fraction=0.5, folder=tmp_path)
    assert len(tokenizer.encode("zzzz")) == 4 and len(tokenizer.encode("number")) < 6
    [kept] = tmp_path.glob("bpe-*")
    (kept / "tokenizer.json").write_text("{")
    assert cached_bpe(corpus, 300, val_fraction=0.5, folder=tmp_path).fingerprint == tokenizer.fingerprint


def test_the_cache_lies_with_the_users_other_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert text_cache() == tmp_path / "omnimix" / "text"


def test_odd_files_are_left_out_and_counted(tmp_path):
    (tmp_path / ".#notes.txt").symlink_to("nowhere")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    (tmp_path / "a.txt").write_text("text")
    assert [name for name, _ in TextFiles(tmp_path, patterns=["*.txt"]).files] == ["a.txt"]
    (tmp_path / "deep.jsonl").write_text("[" * 200_000 + '\n{"text": "kept"}\n')
    lines = JsonLines(tmp_path / "deep.jsonl")
    assert texts(lines) == ["kept"] and list(lines.problems) == ["deep.jsonl:1"]


@pytest.mark.parametrize(
    "headers", [{"GNU.sparse.size": "200000000", "GNU.sparse.map": "0,4"}, {"GNU.sparse.map": "x,y"}], ids=str
)
def test_sparse_members_are_refused(tmp_path, headers):
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.PAX_FORMAT) as shard:
        member = tarfile.TarInfo("a.txt")
        member.size, member.pax_headers = 4, headers
        shard.addfile(member, io.BytesIO(b"text"))
    shards = Shards(tmp_path / "s.tar")
    assert texts(shards) == [] and len(shards.problems) == 1


def test_bpe_learns_a_part_of_each_long_document(tmp_path, monkeypatch):
    from omnimix.modalities.data import token_cache

    for i in range(6):
        (tmp_path / f"{i}.txt").write_text(f"some words of file {i} " * 200)
    monkeypatch.setattr(token_cache, "_SAMPLE", 1000)
    monkeypatch.setattr(token_cache, "_LONG", 1000)
    corpus = TextFiles(tmp_path, patterns=["*.txt"])
    assert cached_bpe(corpus, 280, val_fraction=0.1, folder=tmp_path / "cache").vocab_size > 260


@pytest.mark.parametrize("answers_only", [True, False])
def test_names_of_special_tokens_are_no_text(tmp_path, answers_only):
    template = "{{bos_token}}{% for m in messages %}<|im_start|>{{m.role}}\n{{m.content}}<|im_end|>\n{% endfor %}"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}]
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    tokenizer = ByteTokenizer(TURN, template=template)
    corpus = JsonLines(tmp_path / "c.jsonl", field="messages", chat=True)
    cache = cached_tokens(corpus, tokenizer, folder=tmp_path / "cache", answers_only=answers_only)
    ids = cache.tokens.tolist()
    assert ids.count(tokenizer.end) == 2
    written = "bc" if answers_only else "user\na\nassistant\nbc\n"
    assert cache.text_bytes.tolist() == [len(written)]
