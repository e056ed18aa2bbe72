// One step of the gated linear recurrence: the state is read once and written once.
#include <cmath>

#include "../native.h"

namespace {

enum { Q, K, V_, DECAY, BONUS, STATE, OUTPUT, FINAL };
// Vectors of values that go through the keys together, in registers.
constexpr int TOGETHER = 4;

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

// One head: q and k are given per key channel, `retain` is e^decay, `bonus` the weight of the current token.
template <class S>
struct Head {
    const S *q, *k, *retain, *bonus, *value, *state;
    S *output, *final;
    int64_t keys, values;
    S scale;
};

template <class S, int VECTORS, bool FULL>
void columns(const Head<S>& h, int64_t first) {
    using M = Math<S>;
    using V = typename M::V;
    const int last = FULL ? M::lanes : int(h.values - first - (VECTORS - 1) * M::lanes);
    const auto width = [&](int i) { return FULL || i + 1 < VECTORS ? M::lanes : last; };
    V value[VECTORS], sum[VECTORS] = {};
    for (int i = 0; i < VECTORS; i++) value[i] = M::load(h.value + first + i * M::lanes, width(i));
    S current = 0;
    for (int64_t c = 0; c < h.keys; c++) {
        const S q = h.q[c], k = h.k[c], r = h.retain[c];
        if (h.bonus) current += q * h.bonus[c] * k;
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS; i++) {
            const int64_t at = c * h.values + first + i * M::lanes;
            const V before = h.state ? M::load(h.state + at, width(i)) : V{};
            const V after = before * r + value[i] * k;
            M::store(h.final + at, after, width(i));
            sum[i] += (h.bonus ? before : after) * q;
        }
    }
    for (int i = 0; i < VECTORS; i++)
        M::store(h.output + first + i * M::lanes, (sum[i] + value[i] * current) * h.scale, width(i));
}

template <class S>
void step(const Head<S>& h) {
    constexpr int64_t L = Math<S>::lanes;
    int64_t first = 0;
    for (; first + TOGETHER * L <= h.values; first += TOGETHER * L) columns<S, TOGETHER, true>(h, first);
    for (; first + L <= h.values; first += L) columns<S, 1, true>(h, first);
    if (first < h.values) columns<S, 1, false>(h, first);
}

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
                    retain[c] = c && !call.channels ? retain[0] : std::exp(v[DECAY].at<S>(b, head)[c]);
            step(Head<S>{v[Q].at<S>(b, group), v[K].at<S>(b, group), retain.data(),
                         v[BONUS] ? v[BONUS].at<S>(head) : nullptr, v[V_].at<S>(b, head),
                         v[STATE] ? v[STATE].at<S>(b, head) : nullptr, v[OUTPUT].at<S>(b, head),
                         v[FINAL].at<S>(b, head), call.keys, call.values, S(call.scale)});
        }
    }
}

// Mamba-2's step from its projections on: the short convolution, the step size, the recurrence and the skip.
namespace mamba2 {

enum { XBC, DT, CONV_WEIGHT, CONV_BIAS, DT_BIAS, A_LOG, SKIP, WINDOW, STATE, OUTPUT, NEXT_WINDOW, FINAL };

struct Call {
    const View* v;
    int64_t threads, batch, groups, heads, keys, values, taps, tasks;

    Call(const View* views, const int64_t* n)
        : v(views), threads(n[0]), batch(n[1]), groups(n[2]), heads(n[3]), keys(n[4]), values(n[5]), taps(n[6]),
          tasks(n[7]) {}
};

// Filters the channels of a sequence into `to`, with silu, and moves its window on.
template <class S, int W>
void filter(const Call& call, int64_t b, int64_t channels, S* to) {
    using M = Math<S>;
    const int64_t w = W ? W : call.taps;
    const S *x = call.v[XBC].at<S>(b), *taps = call.v[CONV_WEIGHT].at<S>(), *bias = call.v[CONV_BIAS].at<S>();
    const S* before = w > 1 ? call.v[WINDOW].at<S>(b) : nullptr;
    S* after = w > 1 ? call.v[NEXT_WINDOW].at<S>(b) : nullptr;
    for (int64_t c = 0; c < channels; c++) {
        S sum = bias[c] + taps[c * w + w - 1] * x[c];
        for (int64_t j = 0; j < w - 1; j++) {
            sum += taps[c * w + j] * before[c * (w - 1) + j];
            after[c * (w - 1) + j] = j + 1 < w - 1 ? before[c * (w - 1) + j + 1] : x[c];
        }
        to[c] = sum;
    }
    for (int64_t c = 0; c < channels; c += M::lanes) {
        const int width = int(std::min<int64_t>(M::lanes, channels - c));
        const auto z = M::load(to + c, width);
        M::store(to + c, z * M::sigmoid(z), width);
    }
}

template <class S>
void run(const View* views, const int64_t* numbers) {
    const Call call(views, numbers);
    const View* v = call.v;
    const int64_t inner = call.heads * call.values, shared = call.groups * call.keys, channels = inner + 2 * shared;
    std::vector<S> filtered(call.batch * channels);
    for (int64_t b = 0; b < call.batch; b++)
        call.taps == 4 ? filter<S, 4>(call, b, channels, &filtered[b * channels])
                       : filter<S, 0>(call, b, channels, &filtered[b * channels]);
#pragma omp parallel for num_threads(std::min(call.threads, call.tasks)) schedule(static, 1)
    for (int64_t task = 0; task < call.tasks; task++) {
        const int64_t all = call.batch * call.heads, last = all * (task + 1) / call.tasks;
        std::vector<S> retain(call.keys), value(call.values);
        for (int64_t i = all * task / call.tasks; i < last; i++) {
            const int64_t b = i / call.heads, head = i % call.heads, group = head / (call.heads / call.groups);
            const S* x = &filtered[b * channels + head * call.values];
            const S* keys = &filtered[b * channels + inner + group * call.keys];
            const S raw = v[DT].at<S>(b)[head] + v[DT_BIAS].at<S>()[head];
            const S dt = std::max(raw, S(0)) + std::log1p(std::exp(-std::abs(raw)));
            std::fill(retain.begin(), retain.end(), std::exp(-dt * std::exp(v[A_LOG].at<S>()[head])));
            for (int64_t j = 0; j < call.values; j++) value[j] = x[j] * dt;
            S* output = v[OUTPUT].at<S>(b, head);
            step(Head<S>{keys + shared, keys, retain.data(), nullptr, value.data(), v[STATE].at<S>(b, head), output,
                         v[FINAL].at<S>(b, head), call.keys, call.values, S(1)});
            const S skip = v[SKIP].at<S>()[head];
            for (int64_t j = 0; j < call.values; j++) output[j] += x[j] * skip;
        }
    }
}

}  // namespace mamba2
}  // namespace

extern "C" {
void mamba2_step_float(const View* v, const int64_t* n) { mamba2::run<float>(v, n); }
void mamba2_step_double(const View* v, const int64_t* n) { mamba2::run<double>(v, n); }
void gated_linear_step_float(const View* v, const int64_t* n) { run<float>(v, n); }
void gated_linear_step_double(const View* v, const int64_t* n) { run<double>(v, n); }
}
