/* Part of sm4_avx2_template.h: the word-sliced path for few blocks, made for latency. Internal.
 *
 * A vector holds one word of 4 (xmm) or 8 (ymm) blocks, bytes in memory order, so the linear layer is byte rotations inside 32-bit
 * lanes: X[i+4] = X[i] + u + (w by one byte) + (v by two) + (v by three), with u, w, v = u + w from substitute_words. */

#if defined(WORD_VECTOR_256)
typedef __m256i word_vector;
enum { WORD_VECTOR_BLOCKS = 8, BLOCKS_PER_LOAD = 2 };
#define WORD(operation) _mm256_##operation
#define WORD_XOR _mm256_xor_si256
#define WORD_CONSTANT(...) _mm256_broadcastsi128_si256(_mm_setr_epi8(__VA_ARGS__))
#else
typedef __m128i word_vector;
enum { WORD_VECTOR_BLOCKS = 4, BLOCKS_PER_LOAD = 1 };
#define WORD(operation) _mm_##operation
#define WORD_XOR _mm_xor_si128
#define WORD_CONSTANT(...) _mm_setr_epi8(__VA_ARGS__)
#endif

/* Blocks this path takes in one call. */
enum { WORDS_MAX = 16 };

/* Up to BLOCKS_PER_LOAD of the `left` blocks at p; zeros for those that are not there. */
ALWAYS_INLINE word_vector load_words(const uint8_t *p, size_t left)
{
#if defined(WORD_VECTOR_256)
    if (left >= 2)
        return _mm256_loadu_si256((const __m256i *)p);
    if (left == 1)
        return _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i *)p));
    return _mm256_setzero_si256();
#else
    return left ? _mm_loadu_si128((const __m128i *)p) : _mm_setzero_si128();
#endif
}

ALWAYS_INLINE void store_words(uint8_t *p, word_vector x, size_t left)
{
#if defined(WORD_VECTOR_256)
    if (left >= 2)
        _mm256_storeu_si256((__m256i *)p, x);
    else if (left == 1)
        _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(x));
#else
    if (left)
        _mm_storeu_si128((__m128i *)p, x);
#endif
}

/* Transposes 4 x 4 words in every 128-bit lane; its own inverse. */
ALWAYS_INLINE void transpose_words(word_vector x[4])
{
    const word_vector a = WORD(unpacklo_epi32)(x[0], x[1]), b = WORD(unpackhi_epi32)(x[0], x[1]);
    const word_vector c = WORD(unpacklo_epi32)(x[2], x[3]), d = WORD(unpackhi_epi32)(x[2], x[3]);
    x[0] = WORD(unpacklo_epi64)(a, c);
    x[1] = WORD(unpackhi_epi64)(a, c);
    x[2] = WORD(unpacklo_epi64)(b, d);
    x[3] = WORD(unpackhi_epi64)(b, d);
}

/* One round: x0 becomes the new word, z the argument of the next round. The new word itself is not on the path from z to z. */
ALWAYS_INLINE void word_round(word_vector *z, word_vector *x0, word_vector x2, word_vector x3, word_vector next_key)
{
    const word_vector by_one = WORD_CONSTANT(3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14);
    const word_vector by_two = WORD_CONSTANT(2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    const word_vector by_three = WORD_CONSTANT(1, 2, 3, 0, 5, 6, 7, 4, 9, 10, 11, 8, 13, 14, 15, 12);
    word_vector early = WORD_XOR(WORD_XOR(x2, next_key), WORD_XOR(x3, *x0)), u, w, v;
    /* The two barriers keep compilers from regrouping the sums. */
    __asm__("" : "+x"(early));
    substitute_words(*z, &u, &w, &v);
    u = WORD_XOR(u, WORD(shuffle_epi8)(w, by_one));
    v = WORD_XOR(WORD(shuffle_epi8)(v, by_two), WORD(shuffle_epi8)(v, by_three));
    __asm__("" : "+x"(v));
    *z = WORD_XOR(WORD_XOR(early, u), v);
    *x0 = WORD_XOR(WORD_XOR(*x0, u), v);
}

/* out = E(in + before) + after for count <= vectors * WORD_VECTOR_BLOCKS blocks; before and after may be NULL (zero). `vectors` is a
 * constant at every call. */
ALWAYS_INLINE void words_of(const csvf_sm4_schedule *schedule, uint8_t *out, const uint8_t *in, const uint8_t *before,
                            const uint8_t *after, size_t count, const size_t vectors)
{
    word_vector x[4][4];
    UNROLL(4)
    for (size_t v = 0; v < vectors; v++) {
        UNROLL(4)
        for (size_t i = 0; i < 4; i++) {
            const size_t at = v * WORD_VECTOR_BLOCKS + i * BLOCKS_PER_LOAD, left = count > at ? count - at : 0;
            x[v][i] = load_words(in + 16 * at, left);
            if (before)
                x[v][i] = WORD_XOR(x[v][i], load_words(before + 16 * at, left));
        }
        transpose_words(x[v]);
        UNROLL(4)
        for (size_t i = 0; i < 4; i++)
            x[v][i] = words_into_basis(x[v][i]);
    }
    const uint32_t *key = schedule->words + WORD_KEYS;
    word_vector z[4];
    UNROLL(4)
    for (size_t v = 0; v < vectors; v++)
        z[v] = WORD_XOR(WORD_XOR(x[v][1], x[v][2]), WORD_XOR(x[v][3], WORD(set1_epi32)((int)key[0])));
    /* The last round makes an argument that nobody uses, of the word after the last key. */
    for (size_t i = 0; i < 32; i += 4, key += 4) {
        UNROLL(4)
        for (size_t v = 0; v < vectors; v++)
            word_round(&z[v], &x[v][0], x[v][2], x[v][3], WORD(set1_epi32)((int)key[1]));
        UNROLL(4)
        for (size_t v = 0; v < vectors; v++)
            word_round(&z[v], &x[v][1], x[v][3], x[v][0], WORD(set1_epi32)((int)key[2]));
        UNROLL(4)
        for (size_t v = 0; v < vectors; v++)
            word_round(&z[v], &x[v][2], x[v][0], x[v][1], WORD(set1_epi32)((int)key[3]));
        UNROLL(4)
        for (size_t v = 0; v < vectors; v++)
            word_round(&z[v], &x[v][3], x[v][1], x[v][2], WORD(set1_epi32)((int)key[4]));
    }
    UNROLL(4)
    for (size_t v = 0; v < vectors; v++) {
        word_vector y[4];
        UNROLL(4)
        for (size_t i = 0; i < 4; i++)
            y[i] = words_out_of_basis(x[v][3 - i]);
        transpose_words(y);
        UNROLL(4)
        for (size_t i = 0; i < 4; i++) {
            const size_t at = v * WORD_VECTOR_BLOCKS + i * BLOCKS_PER_LOAD, left = count > at ? count - at : 0;
            if (after)
                y[i] = WORD_XOR(y[i], load_words(after + 16 * at, left));
            store_words(out + 16 * at, y[i], left);
        }
    }
}

/* The same for any count <= WORDS_MAX. */
static __attribute__((noinline)) void words_cipher(const csvf_sm4_schedule *schedule, uint8_t *out, const uint8_t *in,
                                                   const uint8_t *before, const uint8_t *after, size_t count)
{
    if (count <= WORD_VECTOR_BLOCKS)
        words_of(schedule, out, in, before, after, count, 1);
    else if (count <= 2 * WORD_VECTOR_BLOCKS)
        words_of(schedule, out, in, before, after, count, 2);
    else
        words_of(schedule, out, in, before, after, count, WORDS_MAX / WORD_VECTOR_BLOCKS);
}
