// Mamba's selective scan, forward and backward. A vector holds neighbouring channels; a task is one sequence and a range
// of channel blocks, and goes chunk by chunk through time, so that a chunk's rows are in the cache for all its blocks.
// The forward pass keeps the states at the chunks' starts; the backward pass computes those within a chunk again.
#include "../native.h"

namespace {

enum { X, DELTA, A, B, C, D, Z, BIAS, INITIAL, SEGMENTS, Y, FINAL, BORDERS };
enum { DY = BORDERS + 1, DFINAL, DX, DDELTA, DA, DB, DC, DD, DZ, DBIAS, DINITIAL };

struct Call {
    const View* v;
    int64_t threads, sequences, steps, channels, states, groups, chunk, softplus, parts;
    int64_t group_channels, group_blocks, blocks;

    Call(const View* views, const int64_t* n, int lanes)
        : v(views), threads(n[0]), sequences(n[1]), steps(n[2]), channels(n[3]), states(n[4]), groups(n[5]),
          chunk(n[6]), softplus(n[7]), parts(n[8]), group_channels(channels / groups),
          group_blocks((group_channels + lanes - 1) / lanes), blocks(groups * group_blocks) {}
};

// A block of channels of one sequence.
template <class S>
struct Block {
    using M = Math<S>;
    using V = typename M::V;
    int64_t row, group, channel;
    int width;
    V bias, skip;

    Block(const Call& call, int64_t row, int64_t index) : row(row) {
        group = index / call.group_blocks;
        const int64_t first = index % call.group_blocks * M::lanes;
        channel = group * call.group_channels + first;
        width = int(std::min<int64_t>(M::lanes, call.group_channels - first));
        bias = call.v[BIAS] ? M::load(call.v[BIAS].template at<S>(channel), width) : V{};
        skip = call.v[D] ? M::load(call.v[D].template at<S>(channel), width) : V{};
    }

    V load(const View& view, int64_t t) const { return M::load(view.at<S>(row, t) + channel, width); }
    void store(const View& view, int64_t t, V value) const { M::store(view.at<S>(row, t) + channel, value, width); }

    // A's columns in powers of 2 rather than e.
    V decay(const Call& call, int64_t n) const {
        return M::gather(call.v[A].template at<S>(channel) + n, call.v[A].stride[0], width) * S(LOG2E);
    }
};

template <class S>
struct Sequence {
    int64_t row, start, stop, first_chunk, index;

    Sequence(const Call& call, int64_t index) : index(index) {
        const int64_t* at = call.v[SEGMENTS].at<int64_t>(index);
        row = at[0], start = at[1], stop = at[2], first_chunk = at[3];
    }
    int64_t chunks(const Call& call) const { return (stop - start + call.chunk - 1) / call.chunk; }
};

// States [sequence, channel, n] from and to one vector for each n.
template <class S, class V>
void load_states(V* h, const View& view, int64_t sequence, const Block<S>& block, int64_t n) {
    for (int64_t k = 0; k < n; k++)
        h[k] = view ? Math<S>::gather(view.at<S>(sequence, block.channel) + k, view.stride[1], block.width) : V{};
}

template <class S, class V>
void store_states(const View& view, int64_t sequence, const Block<S>& block, const V* h, int64_t n) {
    for (int i = 0; i < block.width; i++)
        for (int64_t k = 0; k < n; k++) view.at<S>(sequence, block.channel + i)[k] = h[k][i];
}

template <class S, int N>
void forward(const Call& call) {
    using M = Math<S>;
    using V = typename M::V;
    const View* v = call.v;
    const int64_t n = N ? N : call.states;
    const int64_t tasks = call.sequences * call.parts;
#pragma omp parallel for num_threads(std::min(call.threads, tasks)) schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; task++) {
        const Sequence<S> sequence(call, task / call.parts);
        const int64_t part = task % call.parts;
        const int64_t first = call.blocks * part / call.parts, last = call.blocks * (part + 1) / call.parts;
        std::vector<V> states((last - first) * n), decays((last - first) * n);
        for (int64_t j = first; j < last; j++) {
            const Block<S> block(call, sequence.row, j);
            load_states<S>(&states[(j - first) * n], v[INITIAL], sequence.index, block, n);
            for (int64_t k = 0; k < n; k++) decays[(j - first) * n + k] = block.decay(call, k);
        }
        for (int64_t c = 0; c < sequence.chunks(call); c++) {
            const int64_t begin = sequence.start + c * call.chunk, end = std::min(begin + call.chunk, sequence.stop);
            for (int64_t j = first; j < last; j++) {
                const Block<S> block(call, sequence.row, j);
                V* h = &states[(j - first) * n];
                const V* a = &decays[(j - first) * n];
                for (int64_t k = 0; k < n; k++)
                    M::store(v[BORDERS].at<S>(sequence.first_chunk + c, k) + block.channel, h[k], block.width);
                for (int64_t t = begin; t < end; t++) {
                    const S* into = v[B].at<S>(sequence.row, t, block.group);
                    const S* out = v[C].at<S>(sequence.row, t, block.group);
                    V delta = block.load(v[DELTA], t) + block.bias;
                    if (call.softplus) delta = M::softplus(delta);
                    const V x = block.load(v[X], t), u = delta * x;
                    V y = block.skip * x;
                    for (int64_t k = 0; k < n; k++) {
                        h[k] = h[k] * M::exp2(delta * a[k]) + u * into[k];
                        y += h[k] * out[k];
                    }
                    if (v[Z]) {
                        const V z = block.load(v[Z], t);
                        y *= z * M::sigmoid(z);
                    }
                    block.store(v[Y], t, y);
                }
            }
        }
        for (int64_t j = first; j < last; j++)
            store_states<S>(v[FINAL], sequence.index, Block<S>(call, sequence.row, j), &states[(j - first) * n], n);
    }
}

// What a backward task keeps of each step of a chunk, and of each block from chunk to chunk.
template <class S>
struct Scratch {
    using V = typename Math<S>::V;
    struct Step {
        V raw, delta, x, u, dy;
    };
    struct Sums {
        V skip, bias;
    };
    int64_t n;
    std::vector<Step> steps;
    std::vector<V> h, decay, into, out;
    std::vector<V> g, a, da;
    std::vector<Sums> sums;

    Scratch(const Call& call, int64_t blocks)
        : n(call.states), steps(call.chunk), h((call.chunk + 1) * n), decay(call.chunk * n), into(call.chunk * n),
          out(call.chunk * n), g(blocks * n), a(blocks * n), da(blocks * n), sums(blocks) {}
};

// Computes a chunk's states again, with the gradient of what the gate multiplies; gives dz.
template <class S, int N>
void replay(const Call& call, const Block<S>& block, Scratch<S>& scratch, const typename Math<S>::V* a, int64_t chunk,
            int64_t begin, int64_t end) {
    using M = Math<S>;
    using V = typename M::V;
    const View* v = call.v;
    const int64_t n = N ? N : call.states;
    for (int64_t k = 0; k < n; k++)
        scratch.h[k] = M::load(v[BORDERS].at<S>(chunk, k) + block.channel, block.width);
    for (int64_t t = begin; t < end; t++) {
        auto& step = scratch.steps[t - begin];
        step.raw = block.load(v[DELTA], t) + block.bias;
        step.delta = call.softplus ? M::softplus(step.raw) : step.raw;
        step.x = block.load(v[X], t);
        step.u = step.delta * step.x;
        step.dy = block.load(v[DY], t);
        const S* into = v[B].at<S>(block.row, t, block.group);
        const V* before = &scratch.h[(t - begin) * n];
        V *after = &scratch.h[(t - begin + 1) * n], *decay = &scratch.decay[(t - begin) * n];
        for (int64_t k = 0; k < n; k++) {
            decay[k] = M::exp2(step.delta * a[k]);
            after[k] = before[k] * decay[k] + step.u * into[k];
        }
        if (v[Z]) {
            const S* out = v[C].at<S>(block.row, t, block.group);
            V y = block.skip * step.x;
            for (int64_t k = 0; k < n; k++) y += after[k] * out[k];
            const V z = block.load(v[Z], t), s = M::sigmoid(z);
            block.store(v[DZ], t, step.dy * y * s * (1 + z * (1 - s)));
            step.dy *= z * s;
        }
    }
}

// Runs back through a chunk. g is the gradient of the state after step t, from the steps behind it.
template <class S, int N>
void retreat(const Call& call, const Block<S>& block, Scratch<S>& scratch, int64_t j, int64_t begin, int64_t end) {
    using M = Math<S>;
    using V = typename M::V;
    const View* v = call.v;
    const int64_t n = N ? N : call.states;
    V *g = &scratch.g[j * n], *da = &scratch.da[j * n];
    const V* a = &scratch.a[j * n];
    for (int64_t t = end - 1; t >= begin; t--) {
        const auto step = scratch.steps[t - begin];
        const int64_t at = (t - begin) * n;
        const S* into = v[B].at<S>(block.row, t, block.group);
        const S* out = v[C].at<S>(block.row, t, block.group);
        V du = {}, ddelta = {};
        for (int64_t k = 0; k < n; k++) {
            const V now = g[k] + step.dy * out[k];
            scratch.out[at + k] += step.dy * scratch.h[at + n + k];
            scratch.into[at + k] += now * step.u;
            du += now * into[k];
            g[k] = now * scratch.decay[at + k];
            const V q = g[k] * scratch.h[at + k];
            ddelta += q * a[k];
            da[k] += q * step.delta;
        }
        block.store(v[DX], t, du * step.delta + block.skip * step.dy);
        scratch.sums[j].skip += step.dy * step.x;
        ddelta = ddelta * S(1 / LOG2E) + du * step.x;
        if (call.softplus) ddelta *= M::sigmoid(step.raw);
        scratch.sums[j].bias += ddelta;
        block.store(v[DDELTA], t, ddelta);
    }
}

// Adds the channels' shares in the gradients of B and C to the part's own, which are summed afterwards.
template <class S>
void flush(const Call& call, Scratch<S>& scratch, int64_t part, int64_t row, int64_t group, int64_t begin, int64_t end) {
    const int64_t n = call.states, width = call.groups * n;
    for (int64_t t = begin; t < end; t++) {
        const int64_t at = (row * call.steps + t) * width + group * n;
        for (int64_t k = 0; k < n; k++) {
            call.v[DB].at<S>(part)[at + k] += Math<S>::sum(scratch.into[(t - begin) * n + k]);
            call.v[DC].at<S>(part)[at + k] += Math<S>::sum(scratch.out[(t - begin) * n + k]);
        }
    }
    std::fill(scratch.into.begin(), scratch.into.end(), typename Math<S>::V{});
    std::fill(scratch.out.begin(), scratch.out.end(), typename Math<S>::V{});
}

template <class S, int N>
void backward(const Call& call) {
    using M = Math<S>;
    const View* v = call.v;
    const int64_t n = call.states;
    const int64_t tasks = call.sequences * call.parts;
#pragma omp parallel for num_threads(std::min(call.threads, tasks)) schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; task++) {
        const Sequence<S> sequence(call, task / call.parts);
        const int64_t part = task % call.parts;
        const int64_t first = call.blocks * part / call.parts, last = call.blocks * (part + 1) / call.parts;
        Scratch<S> scratch(call, last - first);
        for (int64_t j = first; j < last; j++) {
            const Block<S> block(call, sequence.row, j);
            load_states<S>(&scratch.g[(j - first) * n], v[DFINAL], sequence.index, block, n);
            for (int64_t k = 0; k < n; k++) scratch.a[(j - first) * n + k] = block.decay(call, k);
        }
        for (int64_t c = sequence.chunks(call) - 1; c >= 0; c--) {
            const int64_t begin = sequence.start + c * call.chunk, end = std::min(begin + call.chunk, sequence.stop);
            for (int64_t j = first; j < last; j++) {
                const Block<S> block(call, sequence.row, j);
                replay<S, N>(call, block, scratch, &scratch.a[(j - first) * n], sequence.first_chunk + c, begin, end);
                retreat<S, N>(call, block, scratch, j - first, begin, end);
                if (j + 1 == last || (j + 1) % call.group_blocks == 0)
                    flush(call, scratch, part, sequence.row, block.group, begin, end);
            }
        }
        for (int64_t j = first; j < last; j++) {
            const Block<S> block(call, sequence.row, j);
            store_states<S>(v[DA], sequence.index, block, &scratch.da[(j - first) * n], n);
            store_states<S>(v[DINITIAL], sequence.index, block, &scratch.g[(j - first) * n], n);
            M::store(v[DD].at<S>(sequence.index) + block.channel, scratch.sums[j - first].skip, block.width);
            M::store(v[DBIAS].at<S>(sequence.index) + block.channel, scratch.sums[j - first].bias, block.width);
        }
    }
}

// Mamba's 16 states are worth loops of a known length.
template <class S>
void run(const View* views, const int64_t* numbers, bool back) {
    const Call call(views, numbers, Math<S>::lanes);
    if (call.states == 16)
        back ? backward<S, 16>(call) : forward<S, 16>(call);
    else
        back ? backward<S, 0>(call) : forward<S, 0>(call);
}

}  // namespace

extern "C" {
void selective_scan_forward_float(const View* v, const int64_t* n) { run<float>(v, n, false); }
void selective_scan_forward_double(const View* v, const int64_t* n) { run<double>(v, n, false); }
void selective_scan_backward_float(const View* v, const int64_t* n) { run<float>(v, n, true); }
void selective_scan_backward_double(const View* v, const int64_t* n) { run<double>(v, n, true); }
}
