// One step of the gated linear recurrence for one head: the state is read once and written once.
#pragma once

#include "../native.h"

// One head: q and k are given per key channel, `retain` is e^decay, `bonus` the weight of the current token.
template <class S>
struct Head {
    const S *q, *k, *retain, *bonus, *value, *state;
    S *output, *final;
    int64_t keys, values;
    S scale;
};

// Vectors of values that go through the keys together, in registers.
constexpr int TOGETHER = 4;

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
