// What the native kernels share: tensors as addresses with strides, and arithmetic on vectors of the processor's width.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define VECTOR_BYTES 64
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

struct View {
    void* data;
    int64_t stride[3];

    template <class S>
    S* at(int64_t i = 0, int64_t j = 0, int64_t k = 0) const {
        return static_cast<S*>(data) + i * stride[0] + j * stride[1] + k * stride[2];
    }
    explicit operator bool() const { return data != nullptr; }
};

template <class S>
struct Vector;

template <>
struct Vector<float> {
    typedef float V __attribute__((vector_size(VECTOR_BYTES)));
    typedef int32_t I __attribute__((vector_size(VECTOR_BYTES)));
    static constexpr int lanes = VECTOR_BYTES / sizeof(float);
    static constexpr int mantissa = 23, exp_terms = 7, log_terms = 8;
    static constexpr float least_exponent = -126.0f;
};

template <>
struct Vector<double> {
    typedef double V __attribute__((vector_size(VECTOR_BYTES)));
    typedef int64_t I __attribute__((vector_size(VECTOR_BYTES)));
    static constexpr int lanes = VECTOR_BYTES / sizeof(double);
    static constexpr int mantissa = 52, exp_terms = 14, log_terms = 17;
    static constexpr double least_exponent = -1022.0;
};

constexpr double LOG2E = 1.4426950408889634074;

template <class S>
struct Math {
    using V = typename Vector<S>::V;
    using I = typename Vector<S>::I;
    static constexpr int lanes = Vector<S>::lanes;

    // The first `width` elements, followed by zeros.
    static inline V load(const S* from, int width) {
        V v = {};
        if (width == lanes)
            std::memcpy(&v, from, sizeof v);
        else
            std::memcpy(&v, from, width * sizeof(S));
        return v;
    }

    static inline void store(S* to, V v, int width) {
        if (width == lanes)
            std::memcpy(to, &v, sizeof v);
        else
            std::memcpy(to, &v, width * sizeof(S));
    }

    static inline V gather(const S* from, int64_t stride, int width) {
        V v = {};
        for (int i = 0; i < width; i++) v[i] = from[i * stride];
        return v;
    }

    static inline S sum(V v) {
        S total = 0;
        for (int i = 0; i < lanes; i++) total += v[i];
        return total;
    }

    // 2^x for x that is not large: the exponent from the nearest whole number, the rest from the series of 2^f,
    // |f| <= 1/2. What is smaller than the smallest normal number comes out as about that.
    static inline V exp2(V x) {
        constexpr S magic = S(1.5) * S(int64_t(1) << Vector<S>::mantissa);
        const V least = V{} + Vector<S>::least_exponent;
        x = x < least ? least : x;
        const V shifted = x + magic;
        const V f = x - (shifted - magic);
        constexpr Series series{};
        V p = V{} + series.of_exp2[Vector<S>::exp_terms - 1];
#pragma GCC unroll 16
        for (int k = Vector<S>::exp_terms - 2; k >= 0; k--) p = p * f + series.of_exp2[k];
        return (V)((I)p + ((I)shifted << Vector<S>::mantissa));
    }

    static inline V exp(V x) { return exp2(x * S(LOG2E)); }

    static inline V magnitude(V x) { return x < 0 ? -x : x; }

    static inline V sigmoid(V x) {
        const V e = exp(-magnitude(x));
        const V r = 1 / (1 + e);
        return x < 0 ? e * r : r;
    }

    // max(x, 0) + log(1 + u) with u = exp(-|x|), the logarithm as 2 artanh(u / (2 + u)).
    static inline V softplus(V x) {
        const V u = exp(-magnitude(x));
        const V s = u / (2 + u), squared = s * s;
        constexpr int terms = Vector<S>::log_terms;
        V p = V{} + S(1) / (2 * terms - 1);
#pragma GCC unroll 20
        for (int k = terms - 2; k >= 0; k--) p = p * squared + S(1) / (2 * k + 1);
        const V positive = x < 0 ? V{} : x;
        return positive + 2 * s * p;
    }

  private:
    struct Series {
        S of_exp2[16];
        constexpr Series() : of_exp2() {
            double term = 1;
            for (int k = 0; k < 16; k++) {
                of_exp2[k] = S(term);
                term *= 0.69314718055994530942 / (k + 1);
            }
        }
    };
};
