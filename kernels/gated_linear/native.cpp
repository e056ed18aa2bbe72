// The gated linear recurrence: whole sequences, forward and backward, and one step of it.
//
// Whole sequences run the recurrence itself. A tile of R x W vectors of the state stays in registers for a chunk of
// tokens, whose operands lie in the first-level cache; products with a chunk's tokens would save no work at these
// sizes, and need a way of their own for strong decays. A task is a sequence and a range of a group's heads, or a
// slice of the values of one.
//
// The forward pass has values in its vectors, and keeps the states at the starts of blocks of tokens. The backward pass
// has keys in them, so that only dv sums across a vector. It computes a block's states again, chunk by chunk, and takes
// the decay's gradient from the state and its gradient directly, which no decay is too strong for.
#include <cmath>

#include "../common/recurrence.h"
#include "../common/step.h"

namespace {

// Tokens for which a tile of the state stays in registers.
constexpr int CHUNK = 16;
// Rows and vectors of a tile, as many as there are registers for.
constexpr int ROWS = VECTOR_BYTES == 64 ? 8 : 4;
constexpr int WIDE = 2, WIDE_BACK = VECTOR_BYTES == 64 ? 2 : 1;

template <class S>
constexpr int R = ROWS < Math<S>::lanes ? ROWS : Math<S>::lanes;

template <class S, int W>
using Tile = typename Math<S>::V[R<S>][W];

template <class S, int W>
inline void load(Tile<S, W>& tile, const S* from, int64_t width) {
#pragma GCC unroll 8
    for (int r = 0; r < R<S>; r++)
#pragma GCC unroll 2
        for (int w = 0; w < W; w++) tile[r][w] = Math<S>::load(from + r * width + w * Math<S>::lanes, Math<S>::lanes);
}

template <class S, int W>
inline void store(const Tile<S, W>& tile, S* to, int64_t width) {
#pragma GCC unroll 8
    for (int r = 0; r < R<S>; r++)
#pragma GCC unroll 2
        for (int w = 0; w < W; w++) Math<S>::store(to + r * width + w * Math<S>::lanes, tile[r][w], Math<S>::lanes);
}

// Whether the output reads the state before the token is written.
bool reads_before(const Call& call) { return call.own[0]; }

// What a forward task works on: the heads' states, keys by values, and a chunk's tokens of one head, one a row.
template <class S>
struct Forward {
    int64_t keys, values;
    S *states, *q, *k, *decay, *v, *y;

    explicit Forward(const Task<S>& task) : keys(padded<S>(task.call.keys)), values(padded<S>(task.values)) {
        const int64_t all = task.heads() * keys * values, of_keys = CHUNK * keys, of_values = CHUNK * values;
        allot<S>({&states, &q, &k, &decay, &v, &y}, {all, of_keys, of_keys, of_keys, of_values, of_values});
    }

    // n tokens through a tile of a head's state, which starts at `key` and `value`.
    template <int W, bool BEFORE>
    void tile(S* state, int n, int64_t key, int64_t value) const {
        using M = Math<S>;
        using V = typename M::V;
        Tile<S, W> s;
        load<S, W>(s, state + key * values + value, values);
        for (int t = 0; t < n; t++) {
            const S *qt = q + t * keys + key, *kt = k + t * keys + key, *dt = decay + t * keys + key;
            S* yt = y + t * values + value;
            V x[W], sum[W];
#pragma GCC unroll 2
            for (int w = 0; w < W; w++) {
                x[w] = M::load(v + t * values + value + w * M::lanes, M::lanes);
                sum[w] = key ? M::load(yt + w * M::lanes, M::lanes) : V{};
            }
#pragma GCC unroll 8
            for (int r = 0; r < R<S>; r++)
#pragma GCC unroll 2
                for (int w = 0; w < W; w++) {
                    if (BEFORE) sum[w] += s[r][w] * qt[r];
                    s[r][w] = s[r][w] * dt[r] + x[w] * kt[r];
                    if (!BEFORE) sum[w] += s[r][w] * qt[r];
                }
#pragma GCC unroll 2
            for (int w = 0; w < W; w++) M::store(yt + w * M::lanes, sum[w], M::lanes);
        }
        store<S, W>(s, state + key * values + value, values);
    }

    template <int W, bool BEFORE>
    void column(S* state, int n, int64_t value) const {
        for (int64_t key = 0; key < keys; key += R<S>) tile<W, BEFORE>(state, n, key, value);
    }

    template <bool BEFORE>
    void chunk(S* state, int n) const {
        constexpr int64_t step = WIDE * Math<S>::lanes;
        int64_t value = 0;
        for (; value + step <= values; value += step) column<WIDE, BEFORE>(state, n, value);
        if (value < values) column<1, BEFORE>(state, n, value);
    }
};

// Chunk by chunk, and in a chunk head by head: so heads that share q and k read them once, and what lies side by side
// is read and written together.
template <class S>
void forward(const Task<S>& task) {
    const Call& call = task.call;
    const View* v = call.v;
    const Forward<S> work(task);
    const int64_t size = work.keys * work.values;
    const auto write = [&](S* to, const S* state) {
        for (int64_t c = 0; c < call.keys; c++) emit(to + c * call.values, state + c * work.values, task.values);
    };
    std::fill(work.states, work.states + task.heads() * size, S(0));
    for (int64_t head = task.first_head; v[INITIAL] && head < task.last_head; head++)
        for (int64_t c = 0; c < call.keys; c++)
            copy(work.states + (head - task.first_head) * size + c * work.values,
                 task.state(v[INITIAL], task.sequence, head) + c * call.values, task.values);
    for (int64_t t = task.start; t < task.stop; t += CHUNK) {
        const int64_t passed = t - task.start;
        const int n = int(std::min<int64_t>(CHUNK, task.stop - t));
        for (int i = 0; i < n; i++) {
            copy(work.q + i * work.keys, v[Q].at<S>(task.row, t + i, task.group), call.keys, S(call.scale));
            copy(work.k + i * work.keys, v[K].at<S>(task.row, t + i, task.group), call.keys);
        }
        for (int64_t head = task.first_head; head < task.last_head; head++) {
            S* state = work.states + (head - task.first_head) * size;
            if (v[SAVED] && passed && passed % call.block == 0)
                write(task.state(v[SAVED], task.saved + passed / call.block, head), state);
            for (int i = 0; i < n; i++) {
                copy(work.v + i * work.values, v[V_].at<S>(task.row, t + i, head) + task.value, task.values);
                retain(task, work.decay + i * work.keys, t + i, head);
            }
            reads_before(call) ? work.template chunk<true>(state, n) : work.template chunk<false>(state, n);
            for (int i = 0; i < n; i++)
                emit(v[OUTPUT].at<S>(task.row, t + i, head) + task.value, work.y + i * work.values, task.values);
        }
    }
    for (int64_t head = task.first_head; head < task.last_head; head++)
        write(task.state(v[FINAL], task.sequence, head), work.states + (head - task.first_head) * size);
}

// Transposes a matrix by perfect shuffles of its rows, a block of lanes x lanes at a time; what is outside is zero.
template <class S>
void transpose(const S* from, int64_t from_width, int64_t rows, int64_t columns, S* to, int64_t to_width, bool whole) {
    using M = Math<S>;
    constexpr int L = M::lanes;
    typename M::I low, high;
    for (int i = 0; i < L; i++) low[i] = i / 2 + i % 2 * L, high[i] = low[i] + L / 2;
    for (int64_t r = 0; r < rows; r += L)
        for (int64_t c = 0; c < columns; c += L) {
            const int down = int(std::min<int64_t>(L, rows - r)), across = int(std::min<int64_t>(L, columns - c));
            typename M::V x[L] = {}, y[L];
            for (int i = 0; i < down; i++) x[i] = M::load(from + (r + i) * from_width + c, across);
            for (int round = 1; round < L; round *= 2) {
                for (int i = 0; i < L / 2; i++) {
                    y[2 * i] = __builtin_shuffle(x[i], x[i + L / 2], low);
                    y[2 * i + 1] = __builtin_shuffle(x[i], x[i + L / 2], high);
                }
                std::copy(y, y + L, x);
            }
            for (int i = 0; i < (whole ? L : across); i++) M::store(to + (c + i) * to_width + r, x[i], whole ? L : down);
        }
}

// What a backward task works on: the gradients of the heads' states, a head's state at a block's start, both values by
// keys, and a block's tokens of one head, one a row.
template <class S>
struct Backward {
    using M = Math<S>;
    using V = typename M::V;
    static constexpr int L = M::lanes;
    int64_t keys, values;
    S *state, *gradients, *q, *k, *decay, *dq, *dk, *ddecay, *v, *dout, *dv, *starts, *states, *shares;

    explicit Backward(const Task<S>& task) : keys(padded<S>(task.call.keys)), values(padded<S>(task.values)) {
        const int64_t block = task.call.block, all = keys * values, of_keys = block * keys, of_values = block * values;
        const int64_t tile = R<S> * WIDE_BACK * L, chunks = (block + CHUNK - 1) / CHUNK;
        allot<S>({&state, &gradients, &q, &k, &decay, &dq, &dk, &ddecay, &v, &dout, &dv, &starts, &states, &shares},
                 {all, task.heads() * all, of_keys, of_keys, of_keys, of_keys, of_keys, of_keys, of_values, of_values, of_values,
                  chunks * tile, CHUNK * tile, block * L});
    }

    // Computes the state at `to` from that at `from`, n tokens earlier. KEEP: it also keeps the states before each token.
    // READ: it also adds to dq.
    template <int W, bool BEFORE, bool KEEP, bool READ>
    void replay(int t0, int n, int64_t value, int64_t key, const S* from, S* to) const {
        Tile<S, W> s;
        load<S, W>(s, from, W * L);
        for (int t = t0; t < t0 + n; t++) {
            const S *vt = v + t * values + value, *ot = dout + t * values + value;
            V kt[W], dt[W], sum[W];
#pragma GCC unroll 2
            for (int w = 0; w < W; w++) {
                kt[w] = M::load(k + t * keys + key + w * L, L);
                dt[w] = M::load(decay + t * keys + key + w * L, L);
                if (READ) sum[w] = M::load(dq + t * keys + key + w * L, L);
            }
            if (KEEP) store<S, W>(s, states + (t - t0) * R<S> * W * L, W * L);
#pragma GCC unroll 8
            for (int r = 0; r < R<S>; r++)
#pragma GCC unroll 2
                for (int w = 0; w < W; w++) {
                    if (READ && BEFORE) sum[w] += s[r][w] * ot[r];
                    s[r][w] = s[r][w] * dt[w] + kt[w] * vt[r];
                    if (READ && !BEFORE) sum[w] += s[r][w] * ot[r];
                }
#pragma GCC unroll 2
            for (int w = 0; w < W; w++)
                if (READ) M::store(dq + t * keys + key + w * L, sum[w], L);
        }
        store<S, W>(s, to, W * L);
    }

    // Goes back through n tokens. The gradient of the state after a token, as it comes from later ones, becomes that of
    // the state before it.
    template <int W, bool BEFORE, bool DECAY_>
    void retreat(S* gradient, int t0, int n, int64_t value, int64_t key) const {
        Tile<S, W> g;
        load<S, W>(g, gradient + value * keys + key, keys);
        for (int t = t0 + n - 1; t >= t0; t--) {
            const S *vt = v + t * values + value, *ot = dout + t * values + value;
            const S* kept = states + (t - t0) * R<S> * W * L;
            V qt[W], kt[W], dt[W], sum[W], product[W];
#pragma GCC unroll 2
            for (int w = 0; w < W; w++) {
                const int64_t at = t * keys + key + w * L;
                qt[w] = M::load(q + at, L), kt[w] = M::load(k + at, L), dt[w] = M::load(decay + at, L);
                sum[w] = M::load(dk + at, L);
                if (DECAY_) product[w] = M::load(ddecay + at, L);
            }
            const auto row = [&](int r) __attribute__((always_inline)) {
                V p = {};
#pragma GCC unroll 2
                for (int w = 0; w < W; w++) {
                    if (!BEFORE) g[r][w] += qt[w] * ot[r];
                    sum[w] += g[r][w] * vt[r];
                    p = w ? p + g[r][w] * kt[w] : g[r][w] * kt[w];
                    if (DECAY_) product[w] += g[r][w] * M::load(kept + (r * W + w) * L, L);
                    g[r][w] *= dt[w];
                    if (BEFORE) g[r][w] += qt[w] * ot[r];
                }
                return p;
            };
            V share = summed<S, R<S>>(row);
            if (key) share += M::load(shares + t * L, L);
            M::store(shares + t * L, share, L);
#pragma GCC unroll 2
            for (int w = 0; w < W; w++) {
                const int64_t at = t * keys + key + w * L;
                M::store(dk + at, sum[w], L);
                if (DECAY_) M::store(ddecay + at, product[w], L);
            }
        }
        store<S, W>(g, gradient + value * keys + key, keys);
    }

    // All n tokens of a block through a tile: forwards for the chunks' starts, then back chunk by chunk.
    template <int W, bool BEFORE, bool DECAY_>
    void tile(S* gradient, int n, int64_t value, int64_t key) const {
        constexpr int64_t size = R<S> * W * L;
        const int chunks = (n + CHUNK - 1) / CHUNK;
        const auto length = [&](int c) { return std::min(CHUNK, n - c * CHUNK); };
        S* end = starts + (chunks - 1) * size;
        Tile<S, W> s;
        load<S, W>(s, state + value * keys + key, keys);
        store<S, W>(s, starts, W * L);
        for (int c = 0; c + 1 < chunks; c++)
            replay<W, BEFORE, false, true>(c * CHUNK, CHUNK, value, key, starts + c * size, starts + (c + 1) * size);
        replay<W, BEFORE, DECAY_, true>((chunks - 1) * CHUNK, length(chunks - 1), value, key, end, end);
        for (int c = chunks - 1; c >= 0; c--) {
            S* start = starts + c * size;
            if (DECAY_ && c + 1 < chunks) replay<W, BEFORE, true, false>(c * CHUNK, CHUNK, value, key, start, start);
            retreat<W, BEFORE, DECAY_>(gradient, c * CHUNK, length(c), value, key);
        }
    }

    template <bool BEFORE, bool DECAY_>
    void block(S* gradient, int n) const {
        constexpr int64_t step = WIDE_BACK * L;
        for (int64_t value = 0; value < values; value += R<S>) {
            int64_t key = 0;
            for (; key + step <= keys; key += step) tile<WIDE_BACK, BEFORE, DECAY_>(gradient, n, value, key);
            if (key < keys) tile<1, BEFORE, DECAY_>(gradient, n, value, key);
            for (int t = 0; t < n; t++) {
                V share = M::load(shares + t * L, L);
                for (int lanes = R<S>; lanes < L; lanes *= 2) share = fold<S>(share, share);
                M::store(dv + t * values + value, share, R<S>);
            }
        }
    }
};

// Reads a head's n tokens from `first` on.
template <class S>
void read(const Task<S>& task, const Backward<S>& work, int64_t head, int64_t first, int n) {
    const View* v = task.call.v;
    for (int i = 0; i < n; i++) {
        copy(work.v + i * work.values, v[V_].at<S>(task.row, first + i, head) + task.value, task.values);
        copy(work.dout + i * work.values, v[DOUTPUT].at<S>(task.row, first + i, head) + task.value, task.values,
             S(task.call.scale));
        retain(task, work.decay + i * work.keys, first + i, head);
    }
    std::fill(work.ddecay, work.ddecay + n * work.keys, S(0));
}

// Writes what is a head's own of n tokens' gradients.
template <class S>
void write(const Task<S>& task, const Backward<S>& work, int64_t head, int64_t first, int n) {
    using M = Math<S>;
    const Call& call = task.call;
    const View* v = call.v;
    for (int i = 0; i < n; i++) {
        const int64_t token = task.row * call.steps + first + i, at = i * work.keys;
        emit(v[DV].at<S>(task.row, first + i, head) + task.value, work.dv + i * work.values, task.values);
        if (!v[DDECAY]) continue;
        for (int64_t c = 0; c < work.keys; c += M::lanes) {
            const auto product = M::load(work.ddecay + at + c, M::lanes) * M::load(work.decay + at + c, M::lanes);
            M::store(work.ddecay + at + c, product, M::lanes);
        }
        write_decay(task, work.ddecay + at, token, head);
    }
}

// Goes back through a block of one head.
template <class S>
void backward(const Task<S>& task, const Backward<S>& work, int64_t head, int64_t b, int64_t first, int n) {
    const Call& call = task.call;
    const View* v = call.v;
    S* gradient = work.gradients + (head - task.first_head) * work.keys * work.values;
    const S* start = nullptr;
    if (b)
        start = task.state(v[SAVED], task.saved + b, head);
    else if (v[INITIAL])
        start = task.state(v[INITIAL], task.sequence, head);
    if (start)
        transpose(start, call.values, call.keys, task.values, work.state, work.keys, true);
    else
        std::fill(work.state, work.state + work.keys * work.values, S(0));
    read(task, work, head, first, n);
    const bool differentiate = bool(v[DDECAY]);
    if (reads_before(call))
        differentiate ? work.template block<true, true>(gradient, n) : work.template block<true, false>(gradient, n);
    else
        differentiate ? work.template block<false, true>(gradient, n) : work.template block<false, false>(gradient, n);
    write(task, work, head, first, n);
}

template <class S>
void backward(const Task<S>& task) {
    const Call& call = task.call;
    const View* v = call.v;
    const Backward<S> work(task);
    const int64_t size = work.keys * work.values, width = call.groups * call.keys;
    std::fill(work.gradients, work.gradients + task.heads() * size, S(0));
    for (int64_t head = task.first_head; head < task.last_head; head++) {
        if (v[FINAL])
            transpose(task.state(v[FINAL], task.sequence, head), call.values, call.keys, task.values,
                      work.gradients + (head - task.first_head) * size, work.keys, true);
        if (v[DDECAY] && call.kind == PER_HEAD)
            call.share<S>(DDECAY, task.slice, call.sequences, task.sequence, call.heads)[head] = 0;
    }
    for (int64_t b = task.blocks() - 1; b >= 0; b--) {
        const int64_t first = task.start + b * call.block;
        const int n = int(std::min(call.block, task.stop - first));
        for (int i = 0; i < n; i++) {
            copy(work.q + i * work.keys, v[Q].at<S>(task.row, first + i, task.group), call.keys);
            copy(work.k + i * work.keys, v[K].at<S>(task.row, first + i, task.group), call.keys);
        }
        for (S* sums : {work.dq, work.dk}) std::fill(sums, sums + n * work.keys, S(0));
        for (int64_t head = task.first_head; head < task.last_head; head++) backward(task, work, head, b, first, n);
        for (int i = 0; i < n; i++) {
            const int64_t token = task.row * call.steps + first + i, group = task.group * call.keys;
            emit(call.share<S>(DQ, task.part, call.tokens, token, width) + group, work.dq + i * work.keys, call.keys);
            emit(call.share<S>(DK, task.part, call.tokens, token, width) + group, work.dk + i * work.keys, call.keys);
        }
    }
    for (int64_t head = task.first_head; v[DINITIAL] && head < task.last_head; head++)
        transpose(work.gradients + (head - task.first_head) * size, work.keys, task.values, call.keys,
                  task.state(v[DINITIAL], task.sequence, head), call.values, false);
}

template <class S>
void run(const View* views, const int64_t* numbers, bool back) {
    const Call call(views, numbers);
#pragma omp parallel for num_threads(call.threads) schedule(dynamic, 1)
    for (int64_t index = 0; index < call.tasks(); index++) {
        const Task<S> task(call, index);
        back ? backward(task) : forward(task);
    }
}

namespace single {

enum { Q, K, V_, DECAY, BONUS, STATE, OUTPUT, FINAL };

struct Call {
    const View* v;
    int64_t threads, batch, groups, heads, keys, values, channels, tasks;
    double scale;

    Call(const View* views, const int64_t* n)
        : v(views), threads(n[0]), batch(n[1]), groups(n[2]), heads(n[3]), keys(n[4]), values(n[5]), channels(n[6]),
          tasks(n[7]) {
        std::memcpy(&scale, n + 8, sizeof scale);
    }
};

template <class S>
void run(const View* views, const int64_t* numbers) {
    const Call call(views, numbers);
    const View* v = call.v;
#pragma omp parallel for num_threads(std::min(call.threads, call.tasks)) schedule(static, 1)
    for (int64_t task = 0; task < call.tasks; task++) {
        const int64_t all = call.batch * call.heads, last = all * (task + 1) / call.tasks;
        std::vector<S> retain(call.keys, S(1));
        for (int64_t i = all * task / call.tasks; i < last; i++) {
            const int64_t b = i / call.heads, head = i % call.heads, group = head / (call.heads / call.groups);
            if (v[DECAY])
                for (int64_t c = 0; c < call.keys; c++)
                    retain[c] = c && !call.channels ? retain[0] : std::exp(v[DECAY].at<S>(b, 0, head)[c]);
            step(Head<S>{v[Q].at<S>(b, 0, group), v[K].at<S>(b, 0, group), retain.data(),
                         v[BONUS] ? v[BONUS].at<S>(head) : nullptr, v[V_].at<S>(b, 0, head),
                         v[STATE] ? v[STATE].at<S>(b, head) : nullptr, v[OUTPUT].at<S>(b, 0, head),
                         v[FINAL].at<S>(b, head), call.keys, call.values, S(call.scale)});
        }
    }
}

}  // namespace single
}  // namespace

extern "C" {
void gated_linear_forward_float(const View* v, const int64_t* n) { run<float>(v, n, false); }
void gated_linear_forward_double(const View* v, const int64_t* n) { run<double>(v, n, false); }
void gated_linear_backward_float(const View* v, const int64_t* n) { run<float>(v, n, true); }
void gated_linear_backward_double(const View* v, const int64_t* n) { run<double>(v, n, true); }
void gated_linear_step_float(const View* v, const int64_t* n) { single::run<float>(v, n); }
void gated_linear_step_double(const View* v, const int64_t* n) { single::run<double>(v, n); }
}
