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

}  // namespace

extern "C" {
void gated_linear_step_float(const View* v, const int64_t* n) { run<float>(v, n); }
void gated_linear_step_double(const View* v, const int64_t* n) { run<double>(v, n); }
}
