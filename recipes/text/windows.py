"""Batches of token sequences out of a corpus' tokens: windows over packed documents, or pieces of single ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...errors import ConfigError
from ...modalities.data.token_cache import TokenCache
from ..common.loading import Key, mix, own_key

Batch = dict[str, Any]


class PackedWindows:
    """Windows of `length` + 1 tokens over all documents in a ring, the last token of one the first of the next.

    So over an epoch every token is scored once, but for fewer than `length` of them. Where the windows begin is another
    place each epoch. A batch with a boundary between documents inside a window is one row with `cu_seqlens`, others are
    plain rows.

    Args:
        cache: the tokens.
        documents: indices of those to read.
        length: scored tokens of a window.
        seed: of where windows begin.

    Raises:
        ConfigError: no documents.
    """

    def __init__(self, cache: TokenCache, documents: np.ndarray, length: int, *, seed: int):
        if not len(documents):
            raise ConfigError("documents are none; there is nothing to read")
        self.cache, self.documents, self.length, self.seed = cache, documents, length, seed
        self._starts, self._ends = cache.offsets[documents], cache.offsets[documents + 1]
        self._bounds = np.concatenate([[0], np.cumsum(self._ends - self._starts)])
        self.tokens = int(self._bounds[-1])
        # Each document's first token is given and not scored.
        self._bytes = float(cache.text_bytes[documents].sum()) / (self.tokens - len(documents))

    def __len__(self) -> int:
        return max(1, self.tokens // self.length)

    def __getitem__(self, key: Key) -> Batch:
        return self.__getitems__([key])

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        width = self.length + 1
        rows = np.empty((len(keys), width), np.int64)
        starts: list[int] = []
        scored = 0
        for row, (epoch, index) in enumerate(map(own_key, keys)):
            at = (mix(self.seed, epoch, len(self)) + index * self.length) % self.tokens
            found = self._fill(rows[row], at)
            starts += [row * width + start for start in found]
            scored += (width - len(found)) * (keys[row][1] >= 0)
        batch: Batch = {"tokens": torch.from_numpy(rows), "bytes": round(scored * self._bytes)}
        if min(index for _, index in keys) < 0:
            batch["counted"] = torch.tensor([index >= 0 for _, index in keys])[:, None].expand(rows.shape)
        if len(starts) == len(keys):
            return batch
        shared = {name: batch[name].reshape(1, -1) for name in ("tokens", "counted") if name in batch}
        return batch | shared | {"cu_seqlens": torch.tensor([*starts, rows.size], dtype=torch.int32)}

    def _fill(self, row: np.ndarray, at: int) -> list[int]:
        """Read the ring from `at` on; returns where in the row sequences begin."""
        document = int(np.searchsorted(self._bounds, at, side="right")) - 1
        begin = self._starts[document] + at - self._bounds[document]
        starts, done = [], 0
        while done < len(row):
            end = min(self._ends[document], begin + len(row) - done)
            row[done : done + end - begin] = self.cache.tokens[begin:end]
            starts.append(done)
            done += int(end - begin)
            document = (document + 1) % len(self.documents)
            begin = self._starts[document]
        return starts


class Pieces:
    """Documents in pieces of at most `length` + 1 tokens, one a row, filled up on the right.

    A piece begins with the token that the one before ended with, which is then given: every token of a document but
    its first is scored in exactly one piece. The bytes of all pieces add up to those of the documents.

    Args:
        cache: the tokens.
        documents: indices of those to read.
        length: scored tokens of a piece at most.
        fill: what rows are filled up with.
        limit: scored tokens after which no further pieces are taken, out of an order that is random but always the
            same; None takes all.
        sort: whether long pieces come first, so that little is filled up where the order is kept.

    Raises:
        ConfigError: no documents, or none of their tokens is to be scored.
    """

    def __init__(
        self,
        cache: TokenCache,
        documents: np.ndarray,
        length: int,
        *,
        fill: int,
        limit: int | None = None,
        sort: bool = False,
    ):
        self.cache, self.length, self.fill = cache, length, fill
        self.rows = self._cut(np.asarray(documents, np.int64))
        if limit is not None:
            order = np.random.default_rng(0).permutation(len(self.rows))
            before = np.cumsum(self.rows[order, 2]) - self.rows[order, 2]
            self.rows = self.rows[np.sort(order[before < limit])]
        if sort:
            self.rows = self.rows[np.argsort(self.rows[:, 0] - self.rows[:, 1], kind="stable")]
        if not len(self.rows):
            raise ConfigError("of no document is a token left to be scored")

    def _cut(self, documents: np.ndarray) -> np.ndarray:
        """(pieces, 4): begin, end, scored tokens and bytes of all pieces that have any scored token."""
        cache = self.cache
        first, last = cache.offsets[documents], cache.offsets[documents + 1]
        count = -(-(last - first - 1) // self.length)
        owner = np.repeat(np.arange(len(documents)), count)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
        begins = first[owner] + within * self.length
        ends = np.minimum(begins + self.length + 1, last[owner])
        # Scored tokens of all documents up to a position; a document's first token is given.
        counted = cache.counted
        sums = None if counted is None else np.concatenate([[0], np.cumsum(counted, dtype=np.int64)])

        def before(places: np.ndarray) -> np.ndarray:
            return places if sums is None else sums[places]

        start = before(first + 1)
        total = np.maximum(1, before(last) - start)[owner]
        upto, through = before(begins + 1) - start[owner], before(ends) - start[owner]
        # Whole bytes by the share of the scored tokens so far, so that their sum is exact.
        size = cache.text_bytes[documents][owner]
        size = size * through // total - size * upto // total
        return np.stack([begins, ends, through - upto, size], axis=1)[through > upto]

    @property
    def tokens(self) -> int:
        """Scored tokens of all pieces."""
        return int(self.rows[:, 2].sum())

    @property
    def bytes(self) -> int:
        """Bytes of text that these stand for."""
        return int(self.rows[:, 3].sum())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Key) -> Batch:
        return self.__getitems__([key])

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        rows = self.rows[[own_key(key)[1] for key in keys]]
        lengths = rows[:, 1] - rows[:, 0]
        tokens = np.full((len(rows), int(lengths.max())), self.fill, np.int64)
        own = np.array([index >= 0 for _, index in keys])
        counted = None if own.all() and self.cache.counted is None else np.zeros(tokens.shape, bool)
        for i, (begin, end) in enumerate(rows[:, :2]):
            tokens[i, : end - begin] = self.cache.tokens[begin:end]
            if counted is not None and own[i]:
                counted[i, : end - begin] = True if self.cache.counted is None else self.cache.counted[begin:end]
        batch: Batch = {"tokens": torch.from_numpy(tokens), "bytes": int(rows[own, 3].sum())}
        if lengths.min() < lengths.max():
            batch["lengths"] = torch.from_numpy(lengths)
        if counted is not None:
            batch["counted"] = torch.from_numpy(counted)
        return batch
