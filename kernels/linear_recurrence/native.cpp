// h_t = a_t h_{t-1} + x_t, elementwise, forward and backward. A task is one sequence and a range of channels, and reads
// each row once; the state is the row of the result written before. Complex numbers are neighbouring pairs of lanes.
#include "../native.h"

namespace {

// The views: the forward pass's, then what the backward pass has besides.
enum { X, A, INITIAL, SEGMENTS, H, FINAL };
enum { DH = FINAL + 1, DFINAL, DX, DA, DINITIAL, DCONSTANT };

struct Call {
    const View* v;
    int64_t threads, sequences, width, parts, reverse;

    Call(const View* views, const int64_t* n)
        : v(views), threads(n[0]), sequences(n[1]), width(n[2]), parts(n[3]), reverse(n[4]) {}
};

template <class S, bool COMPLEX>
struct Numbers {
    using M = Math<S>;
    using V = typename M::V;
    using I = typename M::I;

    // a b, or conj(a) b.
    template <bool CONJUGATE>
    static inline V multiply(V a, V b) {
        if constexpr (!COMPLEX) {
            return a * b;
        } else {
            I real, imaginary, swapped;
            V sign;
            for (int i = 0; i < M::lanes; i++) {
                real[i] = i & ~1, imaginary[i] = i | 1, swapped[i] = i ^ 1;
                sign[i] = (i & 1) != CONJUGATE ? S(1) : S(-1);
            }
            return __builtin_shuffle(a, real) * b + sign * __builtin_shuffle(a, imaginary) * __builtin_shuffle(b, swapped);
        }
    }
};

// The part of a sequence that one task works on.
struct Range {
    int64_t index, row, start, stop, first, last;

    Range(const Call& call, const View& segments, int64_t task) : index(task / call.parts) {
        const int64_t part = task % call.parts;
        const int64_t* at = segments.at<int64_t>(index);
        row = at[0], start = at[1], stop = at[2];
        // Whole pairs.
        first = call.width / 2 * part / call.parts * 2;
        last = part + 1 == call.parts ? call.width : call.width / 2 * (part + 1) / call.parts * 2;
    }
    // The i-th step in the order of the recurrence.
    int64_t step(const Call& call, int64_t i) const { return call.reverse ? stop - 1 - i : start + i; }
    int64_t steps() const { return stop - start; }
};

template <class S, class F>
inline void each(int64_t first, int64_t last, F f) {
    int64_t c = first;
    for (; c + Math<S>::lanes <= last; c += Math<S>::lanes) f(c, Math<S>::lanes);
    if (c < last) f(c, int(last - c));
}

template <class S, bool COMPLEX>
void forward(const Call& call) {
    using M = Math<S>;
    using N = Numbers<S, COMPLEX>;
    const View* v = call.v;
    const int64_t tasks = call.sequences * call.parts;
#pragma omp parallel for num_threads(std::min(call.threads, tasks)) schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; task++) {
        const Range range(call, v[SEGMENTS], task);
        const std::vector<S> zeros(v[INITIAL] ? 0 : call.width);
        const S* before = v[INITIAL] ? v[INITIAL].at<S>(range.index) : zeros.data();
        for (int64_t i = 0; i < range.steps(); i++) {
            const int64_t t = range.step(call, i);
            const S *x = v[X].at<S>(range.row, t), *a = v[A].at<S>(range.row, t);
            S* h = v[H].at<S>(range.row, t);
            each<S>(range.first, range.last, [&](int64_t c, int w) {
                const auto kept = N::template multiply<false>(M::load(a + c, w), M::load(before + c, w));
                M::store(h + c, kept + M::load(x + c, w), w);
            });
            before = h;
        }
        std::copy(before + range.first, before + range.last, v[FINAL].at<S>(range.index) + range.first);
    }
}

template <class S, bool COMPLEX>
void backward(const Call& call) {
    using M = Math<S>;
    using N = Numbers<S, COMPLEX>;
    const View* v = call.v;
    const int64_t tasks = call.sequences * call.parts;
#pragma omp parallel for num_threads(std::min(call.threads, tasks)) schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; task++) {
        const Range range(call, v[SEGMENTS], task);
        const std::vector<S> zeros(v[INITIAL] ? 0 : call.width);
        std::vector<S> carry(call.width), total(v[DCONSTANT] ? call.width : 0);
        std::copy(v[DFINAL].at<S>(range.index), v[DFINAL].at<S>(range.index) + call.width, carry.begin());
        for (int64_t i = range.steps() - 1; i >= 0; i--) {
            const int64_t t = range.step(call, i);
            const S *dh = v[DH].at<S>(range.row, t), *a = v[A].at<S>(range.row, t);
            const S* before = i ? v[H].at<S>(range.row, range.step(call, i - 1))
                                : v[INITIAL] ? v[INITIAL].at<S>(range.index) : zeros.data();
            S *dx = v[DX].at<S>(range.row, t), *da = v[DA] ? v[DA].at<S>(range.row, t) : nullptr;
            each<S>(range.first, range.last, [&](int64_t c, int w) {
                const auto g = M::load(dh + c, w) + M::load(&carry[c], w);
                M::store(dx + c, g, w);
                M::store(&carry[c], N::template multiply<true>(M::load(a + c, w), g), w);
                const auto through = N::template multiply<true>(M::load(before + c, w), g);
                if (da)
                    M::store(da + c, through, w);
                else
                    M::store(&total[c], M::load(&total[c], w) + through, w);
            });
        }
        std::copy(carry.begin() + range.first, carry.begin() + range.last, v[DINITIAL].at<S>(range.index) + range.first);
        if (v[DCONSTANT])
            std::copy(total.begin() + range.first, total.begin() + range.last,
                      v[DCONSTANT].at<S>(range.index) + range.first);
    }
}

}  // namespace

#define EXPORT(direction, S)                                                            \
    void linear_recurrence_##direction##_##S(const View* v, const int64_t* n) {         \
        const Call call(v, n);                                                          \
        n[5] ? direction<S, true>(call) : direction<S, false>(call);                    \
    }

extern "C" {
EXPORT(forward, float)
EXPORT(forward, double)
EXPORT(backward, float)
EXPORT(backward, double)
}
