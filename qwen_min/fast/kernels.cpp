// y = x W' + b, and y = x W, for float32 x and bfloat16 W, which is widened on its way into the registers.
//
// Weights of half the size take half of the memory, and half of the time where reading them is all that takes time,
// if they are never written out widened. With few tokens each row of W is read once and multiplied by all of them.
// With many, a panel of W is widened into the cache, its outputs side by side, and serves all tokens from there.
// Vectors are the compiler's own extension (GCC, Clang), which maps them to what the processor has.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__)
constexpr int WIDTH = 16, FEW = 6, MANY = 12;  // floats of a vector; tokens whose sums fill its 32 registers
#elif defined(__AVX__)
constexpr int WIDTH = 8, FEW = 2, MANY = 6;  // 16 registers
#else
constexpr int WIDTH = 4, FEW = 2, MANY = 6;
#endif
constexpr int ROWS = 4;             // of W at once, with few tokens
constexpr int OUTPUTS = 2 * WIDTH;  // of a panel
constexpr int64_t DEPTH = 1024;     // inputs of a panel at most: both stay in the second level's cache
constexpr int64_t PANELS_FROM = 20;  // tokens

typedef float floats __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t words __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t halves __attribute__((vector_size(2 * WIDTH)));
typedef std::make_integer_sequence<int, WIDTH> Lanes;

struct Product {
    const float* x;     // (n, inputs)
    const uint16_t* w;  // (outputs, inputs); transposed: (inputs, outputs)
    const float* bias;  // (outputs), or null
    float* y;           // (n, outputs)
    int64_t n, inputs, outputs;
};

static inline floats load(const float* from) {
    floats values;
    memcpy(&values, from, sizeof values);
    return values;
}

static inline floats widened(const uint16_t* from, int64_t count = WIDTH) {  // zeros after `count`
    halves bits = {};
    if (count >= WIDTH)
        memcpy(&bits, from, sizeof bits);  // one instruction, as its size is known
    else if (count > 0)
        memcpy(&bits, from, 2 * count);
    return (floats)(__builtin_convertvector(bits, words) << 16);  // bfloat16 is the upper half of a float32
}

// f(integral_constant<count>()) for a count of 1 to MOST that only the run knows.
template <int MOST, typename F>
static inline void with(int64_t count, F f) {
    if (count == MOST) f(std::integral_constant<int, MOST>());
    if constexpr (MOST > 1)
        if (count < MOST) with<MOST - 1>(count, f);
}

// f(first, integral_constant<count>()) for n tokens in tiles of nearly the same size, at most MOST.
template <int MOST, typename F>
static inline void tiles(int64_t n, F f) {
    int64_t first = 0;
    for (int64_t left = (n + MOST - 1) / MOST; left; left--) {
        const int64_t count = (n - first + left - 1) / left;
        with<MOST>(count, [&](auto tokens) { f(first, tokens); });
        first += count;
    }
}

// Few tokens: each vector holds neighbouring inputs, and its lanes are added up at the end.

template <int HALF, int... LANE>
static inline float lanes(floats values, std::integer_sequence<int, LANE...> all) {
    values += __builtin_shufflevector(values, values, (LANE ^ HALF)...);
    if constexpr (HALF > 1) return lanes<HALF / 2>(values, all);
    return values[0];
}

template <int ROWS, int TOKENS>
static void few(const Product& p, int64_t token, int64_t output) {
    const float* x = p.x + token * p.inputs;
    const uint16_t* w = p.w + output * p.inputs;
    floats sums[ROWS][TOKENS] = {}, weights[ROWS];
    int64_t i = 0;
    for (; i + WIDTH <= p.inputs; i += WIDTH) {
        for (int r = 0; r < ROWS; r++) {
            weights[r] = widened(w + r * p.inputs + i);
            if (i & WIDTH) __builtin_prefetch(w + (r + ROWS) * p.inputs + i, 0, 0);  // the rows to come, read once
        }
        for (int t = 0; t < TOKENS; t++) {
            const floats values = load(x + t * p.inputs + i);
            for (int r = 0; r < ROWS; r++) sums[r][t] += weights[r] * values;
        }
    }
    for (int t = 0; t < TOKENS; t++)
        for (int r = 0; r < ROWS; r++) {
            float sum = p.bias ? p.bias[output + r] : 0;
            for (int64_t j = i; j < p.inputs; j++) sum += x[t * p.inputs + j] * widened(w + r * p.inputs + j, 1)[0];
            p.y[(token + t) * p.outputs + output + r] = sum + lanes<WIDTH / 2>(sums[r][t], Lanes());
        }
}

// Many tokens: each vector holds neighbouring outputs, from a panel (depth, OUTPUTS).

template <int HALF, int... LANE>
static inline void swapped(floats& a, floats& b, std::integer_sequence<int, LANE...>) {
    const floats first = __builtin_shufflevector(a, b, (LANE & HALF ? WIDTH + LANE - HALF : LANE)...);
    b = __builtin_shufflevector(a, b, (LANE & HALF ? WIDTH + LANE : LANE + HALF)...);
    a = first;
}

template <int HALF = 1>
static inline void transpose(floats (&square)[WIDTH]) {
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++)
        if (!(i & HALF)) swapped<HALF>(square[i], square[i + HALF], Lanes());
    if constexpr (2 * HALF < WIDTH) transpose<2 * HALF>(square);
}

// Outputs from `output` on, inputs from `input` on, of W (outputs, inputs).
static void pack(const Product& p, int64_t output, int64_t input, int64_t depth, float* panel) {
    for (int64_t o = 0; o < OUTPUTS; o += WIDTH)
        for (int64_t i = 0; i < depth; i += WIDTH) {
            floats square[WIDTH];
#pragma GCC unroll 16
            for (int r = 0; r < WIDTH; r++) {
                const uint16_t* from = p.w + (output + o + r) * p.inputs + input + i;
                square[r] = output + o + r < p.outputs ? widened(from, depth - i) : floats{};
                __builtin_prefetch(from + 64);
            }
            transpose(square);
            for (int r = 0; r < WIDTH; r++) memcpy(panel + (i + r) * OUTPUTS + o, &square[r], sizeof(floats));
        }
}

// The same of W (inputs, outputs).
static void pack_transposed(const Product& p, int64_t output, int64_t input, int64_t depth, float* panel) {
    for (int64_t i = 0; i < depth; i++)
        for (int64_t o = 0; o < OUTPUTS; o += WIDTH) {
            const floats values = widened(p.w + (input + i) * p.outputs + output + o, p.outputs - output - o);
            memcpy(panel + i * OUTPUTS + o, &values, sizeof values);
            __builtin_prefetch(p.w + (input + i + 16) * p.outputs + output + o);  // the rows to come
        }
}

template <int TOKENS>
static void many(const Product& p, int64_t token, int64_t output, int64_t input, int64_t depth, const float* panel) {
    const float* x = p.x + token * p.inputs + input;
    floats sums[TOKENS][2] = {};
    for (int64_t i = 0; i < depth; i++) {
        const floats first = load(panel + i * OUTPUTS), second = load(panel + i * OUTPUTS + WIDTH);
        for (int t = 0; t < TOKENS; t++) {
            sums[t][0] += x[t * p.inputs + i] * first;
            sums[t][1] += x[t * p.inputs + i] * second;
        }
    }
    const int64_t count = std::min<int64_t>(OUTPUTS, p.outputs - output);
    for (int t = 0; t < TOKENS; t++) {
        float* y = p.y + (token + t) * p.outputs + output;
        float total[OUTPUTS];
        memcpy(total, sums[t], sizeof total);
        const float* before = input ? y : p.bias ? p.bias + output : nullptr;
        for (int64_t o = 0; o < count; o++) y[o] = total[o] + (before ? before[o] : 0);
    }
}

extern "C" void linear_bfloat16(const float* x, const uint16_t* w, const float* bias, float* y, int64_t n,
                                int64_t inputs, int64_t outputs, int transposed) {
    const Product p = {x, w, bias, y, n, inputs, outputs};
    if (n < PANELS_FROM && !transposed) {
#pragma omp parallel for schedule(static)
        for (int64_t block = 0; block < (outputs + ROWS - 1) / ROWS; block++)
            tiles<FEW>(n, [&](int64_t token, auto tokens) {
                const int64_t o = block * ROWS;
                if (o + ROWS <= outputs)
                    few<ROWS, tokens()>(p, token, o);
                else
                    for (int64_t last = o; last < outputs; last++) few<1, tokens()>(p, token, last);
            });
        return;
    }
    const int64_t parts = (inputs + DEPTH - 1) / DEPTH, most = ((inputs + parts - 1) / parts + WIDTH - 1) / WIDTH * WIDTH;
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < (outputs + OUTPUTS - 1) / OUTPUTS; block++) {
        alignas(64) float panel[DEPTH * OUTPUTS];
        const int64_t output = block * OUTPUTS;
        for (int64_t input = 0; input < inputs; input += most) {
            const int64_t depth = std::min(most, inputs - input);
            (transposed ? pack_transposed : pack)(p, output, input, depth, panel);
            tiles<MANY>(n, [&](int64_t token, auto tokens) { many<tokens()>(p, token, output, input, depth, panel); });
        }
    }
}
