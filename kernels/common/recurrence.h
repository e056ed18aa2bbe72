// What the recurrences with a matrix state share, in passes over whole sequences: the arguments that they have in common,
// how the work is divided into tasks, scratch memory, decays, and sums across vectors.
#pragma once

#include <cmath>
#include <new>

#include "../native.h"

namespace {

// The first views of a call. A backward pass has the gradients of final state and output in their places, and after them
// those that it writes.
enum { Q, K, V_, DECAY, INITIAL, SEGMENTS, SAVED, FINAL, OUTPUT };
enum { DOUTPUT = OUTPUT, DQ, DK, DV, DDECAY, DINITIAL, OWN };
enum { NONE, PER_HEAD, PER_STEP, PER_CHANNEL };

template <class S>
int64_t padded(int64_t n) {
    return (n + Math<S>::lanes - 1) / Math<S>::lanes * Math<S>::lanes;
}

struct Call {
    const View* v;
    int64_t threads, sequences, tokens, steps, groups, heads, keys, values, block, kind, head_parts, value_parts;
    double scale;
    const int64_t* own;  // numbers that only one op has

    Call(const View* views, const int64_t* n)
        : v(views), threads(n[1]), sequences(n[2]), tokens(n[3]), steps(n[4]), groups(n[5]), heads(n[6]), keys(n[7]),
          values(n[8]), block(n[9]), kind(n[10]), head_parts(n[11]), value_parts(n[12]), own(n + 14) {
        std::memcpy(&scale, n + 13, sizeof scale);
    }
    int64_t tasks() const { return sequences * groups * head_parts * value_parts; }

    // Where a share of a gradient lies: shares follow each other, each of `rows` rows.
    template <class S>
    S* share(int at, int64_t index, int64_t rows, int64_t row, int64_t width) const {
        return v[at].at<S>() + (index * rows + row) * width;
    }
};

// One sequence, some heads of one group, and a slice of their values.
template <class S>
struct Task {
    const Call& call;
    int64_t sequence, row, start, stop, saved, group, first_head, last_head, part, slice, value, values;

    Task(const Call& call, int64_t index) : call(call) {
        slice = index % call.value_parts, index /= call.value_parts;
        const int64_t range = index % call.head_parts;
        index /= call.head_parts;
        group = index % call.groups, sequence = index / call.groups;
        part = range * call.value_parts + slice;
        const int64_t shared = call.heads / call.groups;
        first_head = group * shared + shared * range / call.head_parts;
        last_head = group * shared + shared * (range + 1) / call.head_parts;
        const int64_t lanes = Math<S>::lanes, vectors = (call.values + lanes - 1) / lanes;
        value = vectors * slice / call.value_parts * lanes;
        values = std::min(vectors * (slice + 1) / call.value_parts * lanes, call.values) - value;
        const int64_t* at = call.v[SEGMENTS].at<int64_t>(sequence);
        row = at[0], start = at[1], stop = at[2];
        // The first block starts from the initial state, for which nothing is kept.
        saved = at[3] - sequence - 1;
    }
    int64_t heads() const { return last_head - first_head; }
    int64_t blocks() const { return (stop - start + call.block - 1) / call.block; }
    S* state(const View& view, int64_t index, int64_t head) const { return view.at<S>(index, head) + value; }
};

// Memory of one thread, which it keeps between calls: fresh pages would cost more than the work of a short sequence.
class Scratch {
  public:
    static char* of(size_t bytes) {
        thread_local Scratch kept;
        if (kept.bytes < bytes) {
            kept.release();
            kept.memory = static_cast<char*>(::operator new(bytes, std::align_val_t(64)));
            kept.bytes = bytes;
        }
        return kept.memory;
    }

  private:
    char* memory = nullptr;
    size_t bytes = 0;
    void release() {
        if (memory) ::operator delete(memory, std::align_val_t(64));
    }
    ~Scratch() { release(); }
};

// Divides scratch memory into arrays.
template <class S, int N>
void allot(S** const (&arrays)[N], const int64_t (&sizes)[N]) {
    int64_t total = 0;
    for (int64_t size : sizes) total += padded<S>(size);
    S* at = reinterpret_cast<S*>(Scratch::of(total * sizeof(S)));
    for (int i = 0; i < N; i++) *arrays[i] = at, at += padded<S>(sizes[i]);
}

// Copies n elements into whole vectors, followed by zeros.
template <class S>
void copy(S* to, const S* from, int64_t n, S factor = 1) {
    using M = Math<S>;
    for (int64_t i = 0; i < n; i += M::lanes)
        M::store(to + i, M::load(from + i, int(std::min<int64_t>(M::lanes, n - i))) * factor, M::lanes);
}

// Copies n elements of whole vectors to where there is no more room than that.
template <class S>
void emit(S* to, const S* from, int64_t n) {
    using M = Math<S>;
    for (int64_t i = 0; i < n; i += M::lanes)
        M::store(to + i, M::load(from + i, M::lanes), int(std::min<int64_t>(M::lanes, n - i)));
}

// e^decay of one token and head, a number for each key.
template <class S>
void retain(const Task<S>& task, S* to, int64_t token, int64_t head) {
    using M = Math<S>;
    const Call& call = task.call;
    if (call.kind == PER_CHANNEL) {
        const S* from = call.v[DECAY].at<S>(task.row, token, head);
        for (int64_t c = 0; c < call.keys; c += M::lanes)
            M::store(to + c, M::exp(M::load(from + c, int(std::min<int64_t>(M::lanes, call.keys - c)))), M::lanes);
    } else {
        const S constant = call.kind == NONE ? S(1) : std::exp(*call.v[DECAY].at<S>(task.row, token, head));
        std::fill(to, to + padded<S>(call.keys), constant);
    }
}

// Writes a task's share in the gradient of one token's and head's decay, given for each key and padded with zeros. The
// shares of decays per head begin with zeros.
template <class S>
void write_decay(const Task<S>& task, const S* gradient, int64_t token, int64_t head) {
    using M = Math<S>;
    const Call& call = task.call;
    if (call.kind == PER_CHANNEL) {
        const int64_t width = call.heads * call.keys;
        emit(call.share<S>(DDECAY, task.slice, call.tokens, token, width) + head * call.keys, gradient, call.keys);
        return;
    }
    typename M::V sum = {};
    for (int64_t c = 0; c < padded<S>(call.keys); c += M::lanes) sum += M::load(gradient + c, M::lanes);
    if (call.kind == PER_STEP)
        call.share<S>(DDECAY, task.slice, call.tokens, token, call.heads)[head] = M::sum(sum);
    else
        call.share<S>(DDECAY, task.slice, call.sequences, task.sequence, call.heads)[head] += M::sum(sum);
}

// Sums of neighbours, of a's in the first half and of b's in the second.
template <class S>
inline typename Math<S>::V fold(typename Math<S>::V a, typename Math<S>::V b) {
    typename Math<S>::I even, odd;
    for (int i = 0; i < Math<S>::lanes; i++) even[i] = 2 * i, odd[i] = 2 * i + 1;
    return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
}

// The sums across N vectors, each over L / N neighbouring lanes, in order.
template <class S, int N, class Row>
[[gnu::always_inline]] inline typename Math<S>::V summed(const Row& row, int first = 0) {
    if constexpr (N == 1)
        return row(first);
    else
        return fold<S>(summed<S, N / 2>(row, first), summed<S, N / 2>(row, first + N / 2));
}

}  // namespace
