// (Gated) RMSNorm, forward and backward: a row at a time, which stays in the first-level cache over its few passes.
#include <cmath>

#include "../native.h"

namespace {

enum { X, WEIGHT, GATE, Y };
enum { DY = Y, DX, DWEIGHT, DGATE };

struct Call {
    const View* v;
    int64_t threads, rows, groups, width, silu, before, tasks;
    double eps;

    Call(const View* views, const int64_t* n)
        : v(views), threads(n[0]), rows(n[1]), groups(n[2]), width(n[3]), silu(n[4]), before(n[5]), tasks(n[7]) {
        std::memcpy(&eps, n + 6, sizeof eps);
    }
};

template <class S>
struct Slice {
    using M = Math<S>;
    using V = typename M::V;
    const Call& call;
    const S *x, *gate, *weight;

    Slice(const Call& call, int64_t row, int64_t group)
        : call(call), x(call.v[X].template at<S>(row) + group * call.width),
          gate(call.v[GATE] ? call.v[GATE].template at<S>(row) + group * call.width : nullptr),
          weight(call.v[WEIGHT] ? call.v[WEIGHT].template at<S>() + group * call.width : nullptr) {}

    template <class F>
    void each(F f) const {
        for (int64_t i = 0; i < call.width; i += M::lanes) f(i, int(std::min<int64_t>(M::lanes, call.width - i)));
    }

    // act(gate), and its derivative where asked for.
    V act(int64_t i, int width, V* slope = nullptr) const {
        const V g = M::load(gate + i, width), s = M::sigmoid(g);
        if (slope) *slope = call.silu ? s + g * s * (1 - s) : s * (1 - s);
        return call.silu ? g * s : s;
    }

    S scale(V squares) const { return S(1) / std::sqrt(M::sum(squares) / S(call.width) + S(call.eps)); }

    V weighted(V value, int64_t i, int width) const { return weight ? value * M::load(weight + i, width) : value; }
};

template <class S>
void forward_slice(const Slice<S>& s, S* y) {
    using M = Math<S>;
    using V = typename M::V;
    const bool inside = s.gate && !s.call.before;
    V squares = {};
    s.each([&](int64_t i, int width) {
        V u = M::load(s.x + i, width);
        if (inside) {
            u *= s.act(i, width);
            M::store(y + i, u, width);
        }
        squares += u * u;
    });
    const S r = s.scale(squares);
    s.each([&](int64_t i, int width) {
        V u = s.weighted(M::load((inside ? y : s.x) + i, width) * r, i, width);
        if (s.gate && !inside) u *= s.act(i, width);
        M::store(y + i, u, width);
    });
}

// With h the gradient of the normalised n = r u: the gradient of u is r (h - n mean(h n)).
template <class S>
void backward_slice(const Slice<S>& s, const S* dy, S* dx, S* dgate, S* dweight) {
    using M = Math<S>;
    using V = typename M::V;
    const bool inside = s.gate && !s.call.before;
    V squares = {};
    s.each([&](int64_t i, int width) {
        V u = M::load(s.x + i, width);
        if (inside) u *= s.act(i, width);
        M::store(dx + i, u, width);
        squares += u * u;
    });
    const S r = s.scale(squares);
    V overlap = {};
    s.each([&](int64_t i, int width) {
        const V u = M::load(dx + i, width) * r;
        V d = M::load(dy + i, width);
        if (s.gate && !inside) {
            V slope, a = s.act(i, width, &slope);
            M::store(dgate + i, d * slope * s.weighted(u, i, width), width);
            d *= a;
        }
        if (dweight) M::store(dweight + i, M::load(dweight + i, width) + d * u, width);
        overlap += s.weighted(d, i, width) * u;
    });
    const S mean = M::sum(overlap) / S(s.call.width);
    s.each([&](int64_t i, int width) {
        const V u = M::load(dx + i, width) * r;
        V d = M::load(dy + i, width);
        V slope = {}, a = {};
        if (s.gate) a = s.act(i, width, &slope);
        if (s.gate && !inside) d *= a;
        V du = r * (s.weighted(d, i, width) - u * mean);
        if (inside) {
            M::store(dgate + i, du * slope * M::load(s.x + i, width), width);
            du *= a;
        }
        M::store(dx + i, du, width);
    });
}

template <class S>
void run(const View* views, const int64_t* numbers, bool back) {
    const Call call(views, numbers);
    const View* v = call.v;
#pragma omp parallel for num_threads(std::min(call.threads, call.tasks)) schedule(dynamic, 1)
    for (int64_t task = 0; task < call.tasks; task++) {
        const int64_t last = call.rows * (task + 1) / call.tasks;
        S* dweight = back && v[DWEIGHT] ? v[DWEIGHT].at<S>(task) : nullptr;
        for (int64_t row = call.rows * task / call.tasks; row < last; row++)
            for (int64_t g = 0; g < call.groups; g++) {
                const Slice<S> slice(call, row, g);
                const int64_t at = g * call.width;
                if (back)
                    backward_slice(slice, v[DY].at<S>(row) + at, v[DX].at<S>(row) + at,
                                   v[DGATE] ? v[DGATE].at<S>(row) + at : nullptr, dweight ? dweight + at : nullptr);
                else
                    forward_slice(slice, v[Y].at<S>(row) + at);
            }
    }
}

}  // namespace

extern "C" {
void norm_forward_float(const View* v, const int64_t* n) { run<float>(v, n, false); }
void norm_forward_double(const View* v, const int64_t* n) { run<double>(v, n, false); }
void norm_backward_float(const View* v, const int64_t* n) { run<float>(v, n, true); }
void norm_backward_double(const View* v, const int64_t* n) { run<double>(v, n, true); }
}
