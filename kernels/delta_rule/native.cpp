// The delta rule: whole sequences, forward and backward, and one step of it.
//
// Whole sequences run the recurrence itself, for a few vectors of values at a time: their columns of the state depend
// on no others, and stay in the first-level cache. In both forms
//
//     S <- diag(retain) S + k writeᵀ + a readᵀ,    read = Sᵀ b,
//
// where the delta form writes beta (v - read) with no a, and reads with b = retain removal; the general form writes v.
// What the next token reads is added up while a token is written, so that the state is loaded and stored once a token.
//
// The forward pass keeps the states at the starts of blocks of tokens. The backward pass computes a block's states
// again, one a token, and goes back through them; the gradients of what all values share are sums across vectors. No
// decay is divided by, so none is too strong.
#include <cmath>
#include <type_traits>

#include "../common/recurrence.h"

namespace {

// A forward pass has null addresses for gradients.
enum { BETA = OWN, REMOVAL, A, B, DBETA, DREMOVAL, DA, DB };

// Tokens that a forward pass reads at a time.
constexpr int CHUNK = 16;
// Vectors of values that go through the keys together.
constexpr int WIDE = 4;

// Rows of the state that have sums of their own, so that no sum waits for itself.
template <class S, int W>
constexpr int APART = WIDE / W < Math<S>::lanes ? WIDE / W : Math<S>::lanes;

// Some tokens of one head, one a row. `other` is what `b` is made of: the removal key, or b itself.
template <class S, bool GENERAL>
struct Tokens {
    using M = Math<S>;
    using V = typename M::V;
    static constexpr int L = M::lanes;
    int64_t keys, values;
    S *q, *k, *a, *other, *b, *retain, *v, *beta;

    // What all heads of a group share.
    void read_group(const Task<S>& task, int64_t first, int n, S scale) const {
        const Call& call = task.call;
        const View* view = call.v;
        const View& removes = GENERAL ? view[B] : view[REMOVAL] ? view[REMOVAL] : view[K];
        for (int i = 0; i < n; i++) {
            copy(q + i * keys, view[Q].at<S>(task.row, first + i, task.group), call.keys, scale);
            copy(k + i * keys, view[K].at<S>(task.row, first + i, task.group), call.keys);
            copy(other + i * keys, removes.at<S>(task.row, first + i, task.group), call.keys);
            if (GENERAL) copy(a + i * keys, view[A].at<S>(task.row, first + i, task.group), call.keys);
        }
    }

    void read_head(const Task<S>& task, int64_t first, int n, int64_t head) const {
        const View* view = task.call.v;
        for (int i = 0; i < n; i++) {
            copy(v + i * values, view[V_].at<S>(task.row, first + i, head) + task.value, task.values);
            ::retain(task, retain + i * keys, first + i, head);
            if (GENERAL) continue;
            beta[i] = view[BETA] ? *view[BETA].at<S>(task.row, first + i, head) : S(1);
            for (int64_t c = i * keys; c < (i + 1) * keys; c += L)
                M::store(b + c, M::load(other + c, L) * M::load(retain + c, L), L);
        }
    }

    // What the first token reads from a state of rows of `width` values.
    template <int W>
    void start(const S* state, int64_t width, V (&read)[W]) const {
        V sum[APART<S, W>][W] = {};
        for (int64_t c = 0; c < keys; c += APART<S, W>)
#pragma GCC unroll 4
            for (int r = 0; r < APART<S, W>; r++)
#pragma GCC unroll 4
                for (int w = 0; w < W; w++) sum[r][w] += M::load(state + (c + r) * width + w * L, L) * b[c + r];
        total<W>(sum, read);
    }

    template <int W>
    static void total(const V (&sum)[APART<S, W>][W], V (&to)[W]) {
#pragma GCC unroll 4
        for (int w = 0; w < W; w++) {
            to[w] = sum[0][w];
#pragma GCC unroll 4
            for (int r = 1; r < APART<S, W>; r++) to[w] += sum[r][w];
        }
    }
};

// Runs `columns` for all values, as many vectors at a time as there are, up to WIDE.
template <class S, class Columns>
void divide(int64_t values, const Columns& columns) {
    constexpr int64_t L = Math<S>::lanes;
    int64_t value = 0;
    for (; value + WIDE * L <= values; value += WIDE * L) columns(std::integral_constant<int, WIDE>(), value);
    for (; value + 2 * L <= values; value += 2 * L) columns(std::integral_constant<int, 2>(), value);
    if (value < values) columns(std::integral_constant<int, 1>(), value);
}

// What a forward task works on: the heads' states, keys by values, and a chunk's tokens of one head.
template <class S, bool GENERAL>
struct Forward : Tokens<S, GENERAL> {
    using Base = Tokens<S, GENERAL>;
    using typename Base::M;
    using typename Base::V;
    using Base::keys, Base::values, Base::q, Base::k, Base::a, Base::other, Base::b, Base::retain, Base::v, Base::beta;
    static constexpr int L = M::lanes;
    S *states, *y;

    explicit Forward(const Task<S>& task) {
        keys = padded<S>(task.call.keys), values = padded<S>(task.values);
        const int64_t of_keys = CHUNK * keys, of_values = CHUNK * values, own = GENERAL ? 0 : of_keys;
        allot<S>({&states, &q, &k, &a, &other, &b, &retain, &v, &y, &beta},
                 {task.heads() * keys * values, of_keys, of_keys, of_keys - own, of_keys, own, of_keys, of_values,
                  of_values, CHUNK});
        if (GENERAL) b = other;
    }

    // n tokens through the W vectors of a head's values that start at `value`.
    template <int W>
    void column(S* state, int n, int64_t value) const {
        V read[W];
        state += value;
        this->template start<W>(state, values, read);
        for (int t = 0; t < n; t++) {
            const S *qt = q + t * keys, *kt = k + t * keys, *at = a + t * keys, *rt = retain + t * keys;
            // After the last token there is nothing to read.
            const S* next = b + std::min(t + 1, n - 1) * keys;
            V write[W], sum[APART<S, W>][W] = {}, ahead[APART<S, W>][W] = {};
#pragma GCC unroll 4
            for (int w = 0; w < W; w++) {
                write[w] = M::load(v + t * values + value + w * L, L);
                if (!GENERAL) write[w] = (write[w] - read[w]) * beta[t];
            }
            for (int64_t c = 0; c < keys; c += APART<S, W>)
#pragma GCC unroll 4
                for (int r = 0; r < APART<S, W>; r++)
#pragma GCC unroll 4
                    for (int w = 0; w < W; w++) {
                        S* to = state + (c + r) * values + w * L;
                        V s = M::load(to, L) * rt[c + r] + write[w] * kt[c + r];
                        if (GENERAL) s += read[w] * at[c + r];
                        M::store(to, s, L);
                        sum[r][w] += s * qt[c + r];
                        ahead[r][w] += s * next[c + r];
                    }
            V out[W];
            this->template total<W>(sum, out);
            this->template total<W>(ahead, read);
#pragma GCC unroll 4
            for (int w = 0; w < W; w++) M::store(y + t * values + value + w * L, out[w], L);
        }
    }
};

// Chunk by chunk, and in a chunk head by head: so heads that share keys read them once.
template <class S, bool GENERAL>
void forward(const Task<S>& task) {
    const Call& call = task.call;
    const View* v = call.v;
    const Forward<S, GENERAL> work(task);
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
        work.read_group(task, t, n, S(call.scale));
        for (int64_t head = task.first_head; head < task.last_head; head++) {
            S* state = work.states + (head - task.first_head) * size;
            if (v[SAVED] && passed && passed % call.block == 0)
                write(task.state(v[SAVED], task.saved + passed / call.block, head), state);
            work.read_head(task, t, n, head);
            divide<S>(work.values, [&](auto wide, int64_t at) { work.template column<wide>(state, n, at); });
            for (int i = 0; i < n; i++)
                emit(v[OUTPUT].at<S>(task.row, t + i, head) + task.value, work.y + i * work.values, task.values);
        }
    }
    for (int64_t head = task.first_head; head < task.last_head; head++)
        write(task.state(v[FINAL], task.sequence, head), work.states + (head - task.first_head) * size);
}

// Sums across vectors of rows of the state, one row a number, ROWS of them at a time.
template <class S>
struct Sums {
    using M = Math<S>;
    using V = typename M::V;
    static constexpr int L = M::lanes, ROWS = L < 4 ? L : 4;
    S* memory;

    void put(int64_t row, const V (&x)[ROWS]) const {
        M::store(memory + row / ROWS * L, summed<S, ROWS>([&](int r) { return x[r]; }), L);
    }
    void add_to(S* to, int64_t rows) const {
        for (int64_t c = 0; c < rows; c += L) {
            const S* from = memory + c / ROWS * L;
            const V sum = summed<S, L / ROWS>([&](int i) { return M::load(from + i * L, L); });
            M::store(to + c, M::load(to + c, L) + sum, L);
        }
    }
};

// What a backward task works on: the gradients of the heads' states and a block's states, both keys by values, and a
// block's tokens of one head. `read` is what tokens read or, in the delta form, v less that. `dread` and `dretain` are
// a head's gradients of b and of the decays' exponentials.
template <class S, bool GENERAL>
struct Backward : Tokens<S, GENERAL> {
    using Base = Tokens<S, GENERAL>;
    using typename Base::M;
    using typename Base::V;
    using Base::keys, Base::values, Base::q, Base::k, Base::a, Base::other, Base::b, Base::retain, Base::v, Base::beta;
    static constexpr int L = M::lanes, ROWS = Sums<S>::ROWS;
    S *states, *gradients, *read, *dout, *dq, *dk, *da, *dother, *dread, *dretain, *dv, *dbeta, *zeros, *sums;
    int64_t width;  // of a row of `states`

    explicit Backward(const Task<S>& task) {
        keys = padded<S>(task.call.keys), values = padded<S>(task.values);
        width = std::min<int64_t>(values, WIDE * L);
        const int64_t block = task.call.block, of_keys = block * keys, of_values = block * values;
        const int64_t own = GENERAL ? 0 : of_keys;
        allot<S>({&states, &gradients, &q, &k, &a, &other, &b, &retain, &v, &beta, &read, &dout, &dq, &dk, &da, &dother,
                  &dread, &dretain, &dv, &dbeta, &zeros, &sums},
                 {(block + 1) * keys * width, task.heads() * keys * values, of_keys, of_keys, of_keys - own, of_keys,
                  own, of_keys, of_values, block, of_values, of_values, of_keys, of_keys, of_keys - own, of_keys,
                  of_keys, of_keys, of_values, block, std::max(keys, width), 4 * keys / ROWS * L});
        if (GENERAL) b = other;
        std::fill(zeros, zeros + std::max(keys, width), S(0));
    }
    Sums<S> sum(int i) const { return {sums + i * keys / ROWS * L}; }

    // From the state before the first token on, computes those after each of n tokens, and adds to dq.
    template <int W>
    void replay(int n, int64_t value) const {
        V now[W];
        this->template start<W>(states, width, now);
        for (int t = 0; t < n; t++) {
            const S *from = states + t * keys * width, *kt = k + t * keys, *at = a + t * keys, *rt = retain + t * keys;
            const S* next = b + std::min(t + 1, n - 1) * keys;
            S* to = states + (t + 1) * keys * width;
            V write[W], ot[W], ahead[W] = {};
#pragma GCC unroll 4
            for (int w = 0; w < W; w++) {
                const int64_t here = t * values + value + w * L;
                write[w] = M::load(v + here, L), ot[w] = M::load(dout + here, L);
                if (!GENERAL) write[w] -= now[w];
                M::store(read + here, GENERAL ? now[w] : write[w], L);
                if (!GENERAL) write[w] *= beta[t];
            }
            for (int64_t c = 0; c < keys; c += ROWS) {
                V into_q[ROWS] = {};
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
                    for (int w = 0; w < W; w++) {
                        const int64_t here = (c + r) * width + w * L;
                        V s = M::load(from + here, L) * rt[c + r] + write[w] * kt[c + r];
                        if (GENERAL) s += now[w] * at[c + r];
                        M::store(to + here, s, L);
                        into_q[r] += s * ot[w];
                        ahead[w] += s * next[c + r];
                    }
                sum(0).put(c, into_q);
            }
            sum(0).add_to(dq + t * keys, keys);
#pragma GCC unroll 4
            for (int w = 0; w < W; w++) now[w] = ahead[w];
        }
    }

    // Adds the last token's output to the gradient of the state; begins the sums over keys for dv and dread.
    template <int W>
    void enter(S* gradient, int last, int64_t value, V (&into_write)[W], V (&into_read)[W]) const {
        const S *qt = q + last * keys, *kt = k + last * keys, *at = a + last * keys;
        for (int w = 0; w < W; w++) into_write[w] = into_read[w] = V{};
        for (int64_t c = 0; c < keys; c++)
#pragma GCC unroll 4
            for (int w = 0; w < W; w++) {
                S* g = gradient + c * values + w * L;
                const V x = M::load(g, L) + M::load(dout + last * values + value + w * L, L) * qt[c];
                M::store(g, x, L);
                into_write[w] += x * kt[c];
                if (GENERAL) into_read[w] += x * at[c];
            }
    }

    // Goes back through n tokens: the gradient of the state after the last becomes that of the state before the first.
    template <int W, bool DECAY_>
    void retreat(S* gradient, int n, int64_t value) const {
        gradient += value;
        V into_write[W], into_read[W];
        enter<W>(gradient, n - 1, value, into_write, into_read);
        for (int t = n - 1; t >= 0; t--) {
            V write[W], got[W], dgot[W];
#pragma GCC unroll 4
            for (int w = 0; w < W; w++) {
                const int64_t here = t * values + value + w * L;
                got[w] = M::load(read + here, L);
                V into_v = into_write[w];
                if (GENERAL) {
                    write[w] = M::load(v + here, L), dgot[w] = into_read[w];
                } else {
                    dbeta[t] += M::sum(into_v * got[w]);
                    into_v *= beta[t], write[w] = got[w] * beta[t], dgot[w] = -into_v;
                }
                M::store(dv + here, into_v, L);
            }
            pass<W, DECAY_>(gradient, t, value, write, got, dgot, into_write, into_read);
            sum(0).add_to(dk + t * keys, keys);
            sum(1).add_to(dread + t * keys, keys);
            if (DECAY_) sum(2).add_to(dretain + t * keys, keys);
            if (GENERAL) sum(3).add_to(da + t * keys, keys);
        }
    }

    // One token of `retreat`: from the gradient of the state after it to that of the state before it, the output of
    // the token before it included.
    template <int W, bool DECAY_>
    [[gnu::always_inline]] void pass(S* gradient, int t, int64_t value, const V (&write)[W], const V (&got)[W],
                                     const V (&dgot)[W], V (&into_write)[W], V (&into_read)[W]) const {
        const S *before = states + t * keys * width, *rt = retain + t * keys, *bt = b + t * keys;
        const auto previous = [&](const S* x) { return t ? x + (t - 1) * keys : zeros; };
        const S *qt = previous(q), *kt = previous(k), *at = GENERAL ? previous(a) : nullptr;
        V ot[W];
#pragma GCC unroll 4
        for (int w = 0; w < W; w++) {
            ot[w] = t ? M::load(dout + (t - 1) * values + value + w * L, L) : V{};
            into_write[w] = into_read[w] = V{};
        }
        for (int64_t c = 0; c < keys; c += ROWS) {
            V into_k[ROWS] = {}, into_b[ROWS] = {}, into_decay[ROWS] = {}, into_a[ROWS] = {};
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
                for (int w = 0; w < W; w++) {
                    S* to = gradient + (c + r) * values + w * L;
                    const V s = M::load(before + (c + r) * width + w * L, L);
                    V g = M::load(to, L);
                    into_k[r] += g * write[w];
                    into_b[r] += s * dgot[w];
                    if (DECAY_) into_decay[r] += s * g;
                    if (GENERAL) into_a[r] += g * got[w];
                    g = g * rt[c + r] + dgot[w] * bt[c + r] + ot[w] * qt[c + r];
                    M::store(to, g, L);
                    into_write[w] += g * kt[c + r];
                    if (GENERAL) into_read[w] += g * at[c + r];
                }
            sum(0).put(c, into_k), sum(1).put(c, into_b);
            if (DECAY_) sum(2).put(c, into_decay);
            if (GENERAL) sum(3).put(c, into_a);
        }
    }

    // The gradients of n tokens; `start` is the state before the first, rows of `across` values, or null for zeros.
    template <bool DECAY_>
    void block(S* gradient, int n, const S* start, int64_t across, const Task<S>& task) const {
        divide<S>(values, [&](auto wide, int64_t value) {
            std::fill(states, states + keys * width, S(0));
            const int64_t count = std::min<int64_t>(wide * L, task.values - value);
            for (int64_t c = 0; start && c < task.call.keys; c++)
                copy(states + c * width, start + c * across + value, count);
            replay<wide>(n, value);
            retreat<wide, DECAY_>(gradient, n, value);
        });
    }

    // From the gradients of b and of the decays' exponentials to those of what they are made of.
    void finish(int n) const {
        for (int64_t c = 0; c < n * keys; c += L) {
            const V r = M::load(retain + c, L), into_b = M::load(dread + c, L) * (GENERAL ? V{} + 1 : r);
            V into_decay = M::load(dretain + c, L) * r;
            if (!GENERAL) into_decay += into_b * M::load(other + c, L);
            M::store(dretain + c, into_decay, L);
            M::store(dother + c, M::load(dother + c, L) + into_b, L);
        }
    }
};

// Writes what is a head's own of n tokens' gradients.
template <class S, bool GENERAL>
void write(const Task<S>& task, const Backward<S, GENERAL>& work, int64_t head, int64_t first, int n) {
    const Call& call = task.call;
    const View* v = call.v;
    for (int i = 0; i < n; i++) {
        const int64_t token = task.row * call.steps + first + i;
        emit(v[DV].at<S>(task.row, first + i, head) + task.value, work.dv + i * work.values, task.values);
        if (v[DBETA]) call.share<S>(DBETA, task.slice, call.tokens, token, call.heads)[head] = work.dbeta[i];
        if (v[DDECAY]) write_decay(task, work.dretain + i * work.keys, token, head);
    }
}

// Goes back through a block of one head.
template <class S, bool GENERAL>
void backward(const Task<S>& task, const Backward<S, GENERAL>& work, int64_t head, int64_t b, int64_t first, int n) {
    const View* v = task.call.v;
    S* gradient = work.gradients + (head - task.first_head) * work.keys * work.values;
    const S* start = b             ? task.state(v[SAVED], task.saved + b, head)
                     : v[INITIAL] ? task.state(v[INITIAL], task.sequence, head)
                                  : nullptr;
    work.read_head(task, first, n, head);
    for (int i = 0; i < n; i++)
        copy(work.dout + i * work.values, v[DOUTPUT].at<S>(task.row, first + i, head) + task.value, task.values,
             S(task.call.scale));
    for (S* sums : {work.dread, work.dretain}) std::fill(sums, sums + n * work.keys, S(0));
    std::fill(work.dbeta, work.dbeta + n, S(0));
    v[DDECAY] ? work.template block<true>(gradient, n, start, task.call.values, task)
              : work.template block<false>(gradient, n, start, task.call.values, task);
    work.finish(n);
    write(task, work, head, first, n);
}

// Writes what the heads of a group have together of n tokens' gradients.
template <class S, bool GENERAL>
void write_group(const Task<S>& task, const Backward<S, GENERAL>& work, int64_t first, int n) {
    const Call& call = task.call;
    const View* v = call.v;
    const int removes = GENERAL ? DB : DREMOVAL;
    // Keys remove what they write where no others are given.
    for (int64_t c = 0; !v[removes] && c < n * work.keys; c++) work.dk[c] += work.dother[c];
    for (int i = 0; i < n; i++) {
        const int64_t token = task.row * call.steps + first + i;
        const auto give = [&](int at, const S* from) {
            emit(call.share<S>(at, task.part, call.tokens, token, call.groups * call.keys) + task.group * call.keys,
                 from + i * work.keys, call.keys);
        };
        give(DQ, work.dq), give(DK, work.dk);
        if (v[removes]) give(removes, work.dother);
        if (GENERAL) give(DA, work.da);
    }
}

template <class S, bool GENERAL>
void backward(const Task<S>& task) {
    const Call& call = task.call;
    const View* v = call.v;
    const Backward<S, GENERAL> work(task);
    const int64_t size = work.keys * work.values;
    std::fill(work.gradients, work.gradients + task.heads() * size, S(0));
    for (int64_t head = task.first_head; head < task.last_head; head++) {
        S* gradient = work.gradients + (head - task.first_head) * size;
        for (int64_t c = 0; v[FINAL] && c < call.keys; c++)
            copy(gradient + c * work.values, task.state(v[FINAL], task.sequence, head) + c * call.values, task.values);
        if (v[DDECAY] && call.kind == PER_HEAD)
            call.share<S>(DDECAY, task.slice, call.sequences, task.sequence, call.heads)[head] = 0;
    }
    for (int64_t b = task.blocks() - 1; b >= 0; b--) {
        const int64_t first = task.start + b * call.block;
        const int n = int(std::min(call.block, task.stop - first));
        work.read_group(task, first, n, S(1));
        for (S* sums : {work.dq, work.dk, work.dother}) std::fill(sums, sums + n * work.keys, S(0));
        if (GENERAL) std::fill(work.da, work.da + n * work.keys, S(0));
        for (int64_t head = task.first_head; head < task.last_head; head++) backward(task, work, head, b, first, n);
        write_group(task, work, first, n);
    }
    for (int64_t head = task.first_head; v[DINITIAL] && head < task.last_head; head++)
        for (int64_t c = 0; c < call.keys; c++)
            emit(task.state(v[DINITIAL], task.sequence, head) + c * call.values,
                 work.gradients + (head - task.first_head) * size + c * work.values, task.values);
}

template <class S>
void run(const View* views, const int64_t* numbers, bool back) {
    const Call call(views, numbers);
    const bool general = bool(call.v[A]);
#pragma omp parallel for num_threads(call.threads) schedule(dynamic, 1)
    for (int64_t index = 0; index < call.tasks(); index++) {
        const Task<S> task(call, index);
        if (general)
            back ? backward<S, true>(task) : forward<S, true>(task);
        else
            back ? backward<S, false>(task) : forward<S, false>(task);
    }
}

namespace single {

enum { Q, K, V_, BETA, DECAY, REMOVAL, A, B, STATE, OUTPUT, FINAL };

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

// S <- diag(retain) S + a (bᵀ S) + k vᵀ, and scale Sᵀ q, for one vector of values: both passes are over the same lines.
template <class S>
void column(const S* coefficients, int64_t keys, int64_t values, int64_t first, const S* value, const S* state,
            S* output, S* final, S scale) {
    using M = Math<S>;
    using V = typename M::V;
    const int width = int(std::min<int64_t>(M::lanes, values - first));
    const S *retain = coefficients, *a = retain + keys, *b = a + keys, *k = b + keys, *q = k + keys;
    V read[2] = {}, sum[2] = {};
    if (state) {
        int64_t c = 0;
        for (; c + 2 <= keys; c += 2)
            for (int i = 0; i < 2; i++) read[i] += M::load(state + (c + i) * values + first, width) * b[c + i];
        if (c < keys) read[0] += M::load(state + c * values + first, width) * b[c];
        read[0] += read[1];
    }
    const V v = M::load(value + first, width);
    for (int64_t c = 0; c < keys; c++) {
        const V before = state ? M::load(state + c * values + first, width) : V{};
        const V after = before * retain[c] + read[0] * a[c] + v * k[c];
        M::store(final + c * values + first, after, width);
        sum[c % 2] += after * q[c];
    }
    M::store(output + first, (sum[0] + sum[1]) * scale, width);
}

// retain, a, b, k and q of a head, one array after the other, as the general form has them.
template <class S>
void prepare(const Call& call, int64_t batch, int64_t head, S* to) {
    const View* v = call.v;
    const int64_t n = call.keys, group = head / (call.heads / call.groups);
    S *retain = to, *a = to + n, *b = a + n, *k = b + n, *q = k + n;
    const S beta = v[BETA] ? *v[BETA].at<S>(batch, head) : S(1);
    const S* key = v[K].at<S>(batch, group);
    const S* removal = (v[REMOVAL] ? v[REMOVAL] : v[K]).at<S>(batch, group);
    std::copy_n(v[Q].at<S>(batch, group), n, q);
    for (int64_t c = 0; c < n; c++) {
        retain[c] = !v[DECAY] ? S(1) : c && !call.channels ? retain[0] : std::exp(v[DECAY].at<S>(batch, head)[c]);
        a[c] = v[A] ? v[A].at<S>(batch, group)[c] : -beta * key[c];
        // What the delta rule removes is read from the decayed state.
        b[c] = v[A] ? v[B].at<S>(batch, group)[c] : removal[c] * retain[c];
        k[c] = v[A] ? key[c] : beta * key[c];
    }
}

template <class S>
void run(const View* views, const int64_t* numbers) {
    const Call call(views, numbers);
    const View* v = call.v;
#pragma omp parallel for num_threads(std::min(call.threads, call.tasks)) schedule(static, 1)
    for (int64_t task = 0; task < call.tasks; task++) {
        const int64_t all = call.batch * call.heads, last = all * (task + 1) / call.tasks;
        std::vector<S> coefficients(5 * call.keys);
        for (int64_t i = all * task / call.tasks; i < last; i++) {
            const int64_t b = i / call.heads, head = i % call.heads;
            prepare(call, b, head, coefficients.data());
            const S* state = v[STATE] ? v[STATE].at<S>(b, head) : nullptr;
            for (int64_t first = 0; first < call.values; first += Math<S>::lanes)
                column<S>(coefficients.data(), call.keys, call.values, first, v[V_].at<S>(b, head), state,
                          v[OUTPUT].at<S>(b, head), v[FINAL].at<S>(b, head), S(call.scale));
        }
    }
}

}  // namespace single
}  // namespace

extern "C" {
void delta_rule_forward_float(const View* v, const int64_t* n) { run<float>(v, n, false); }
void delta_rule_forward_double(const View* v, const int64_t* n) { run<double>(v, n, false); }
void delta_rule_backward_float(const View* v, const int64_t* n) { run<float>(v, n, true); }
void delta_rule_backward_double(const View* v, const int64_t* n) { run<double>(v, n, true); }
void delta_rule_step_float(const View* v, const int64_t* n) { single::run<float>(v, n); }
void delta_rule_step_double(const View* v, const int64_t* n) { single::run<double>(v, n); }
}
