/* Part of sm4_avx2_template.h: key expansion (GB/T 32907-2016 7.3) in the basis of the kernels. Internal.
 *
 * A state word X is kept as X' = P X + kappa, the kappas chosen such that X'[i+1] + X'[i+2] + X'[i+3] is the argument of the field
 * inversion as it stands: kappa[i+1] + kappa[i+2] + kappa[i+3] = P rk[i] + INPUT_CONSTANT, kappa[0..2] = 0. What the next state word then
 * lacks, e[i] = kappa[i] + kappa[i+4], is a constant of round i, which the byte-sliced rounds add in the form of round_constants(e).
 *
 * The word-sliced rounds add P rk[i] + INPUT_CONSTANT to the sum of three words as usual.
 *
 * In both forms ROUND_CONSTANT, which the S-box constants add to every new byte, is moved into the keys: words 4..7 modulo 8 lack it,
 * so the key of a round that sums an odd number of those holds it. Words 32..35 lack nothing.
 *
 * Schedule words: [0..31] round keys; [32..159] the round constants, the four bytes of a round each four times; [160..163] kappa[3] and
 * [164..179] P_INVERSE kappa[35..32], each byte four times. Words have their bytes in memory order: most significant first. */

enum { WORD_KEYS = 0, SLICED_KEYS = 32, KAPPA_IN = 160, KAPPA_OUT = 164 };

/* Zeros that stay: the asm reads the memory as far as the compiler knows. */
ALWAYS_INLINE void wipe_vectors(void *data, size_t vectors)
{
    __m256i *p = data;
    for (size_t i = 0; i < vectors; i++)
        _mm256_store_si256(p + i, _mm256_setzero_si256());
    __asm__ volatile("" : : "r"(data) : "memory");
}

/* Byte n of x (in memory order), for n = first .. first + 3, each four times. */
ALWAYS_INLINE __m128i spread(__m128i x, int first)
{
    const __m128i order = _mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm_shuffle_epi8(x, _mm_add_epi8(order, _mm_set1_epi8((char)first)));
}

/* Every byte of a word moves n places towards the more significant end, n = 1..3. */
ALWAYS_INLINE __m128i rotate_bytes(__m128i x, int n)
{
    const __m128i by_one = _mm_setr_epi8(1, 2, 3, 0, 5, 6, 7, 4, 9, 10, 11, 8, 13, 14, 15, 12);
    const __m128i by_two = _mm_setr_epi8(2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    const __m128i by_three = _mm_setr_epi8(3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14);
    return _mm_shuffle_epi8(x, n == 1 ? by_one : n == 2 ? by_two : by_three);
}

ALWAYS_INLINE __m128i into_basis_128(__m128i x)
{
    return _mm256_castsi256_si128(into_basis(_mm256_castsi128_si256(x)));
}

ALWAYS_INLINE __m128i out_of_basis_128(__m128i x)
{
    return _mm256_castsi256_si128(out_of_basis(_mm256_castsi128_si256(x)));
}

/* keys[i] = P rk + INPUT_CONSTANT in the order of use. */
static void fill_schedule(csvf_sm4_schedule *schedule, const uint32_t keys[32])
{
    const uint32_t lacking = ROUND_CONSTANT * 0x01010101u;
    uint32_t kappa[40] __attribute__((aligned(32))) = { 0 };
    for (size_t i = 0; i < 32; i++) {
        const uint32_t odd = 0x5a >> (i & 7) & 1; /* rounds 1, 3, 4, 6 modulo 8 */
        const uint32_t key = keys[i] ^ (lacking & (0 - odd));
        schedule->words[WORD_KEYS + i] = key;
        kappa[i + 3] = key ^ kappa[i + 1] ^ kappa[i + 2];
    }
    for (size_t i = 0; i < 32; i += 4) {
        const __m128i e = _mm_xor_si128(_mm_load_si128((const __m128i *)(kappa + i)),
                                        _mm_load_si128((const __m128i *)(kappa + i + 4)));
        const __m128i d = round_constants(e);
        __m128i *to = (__m128i *)(schedule->words + SLICED_KEYS + 4 * i);
        _mm_storeu_si128(to, spread(d, 0));
        _mm_storeu_si128(to + 1, spread(d, 4));
        _mm_storeu_si128(to + 2, spread(d, 8));
        _mm_storeu_si128(to + 3, spread(d, 12));
    }
    const __m128i first = _mm_load_si128((const __m128i *)kappa);
    _mm_storeu_si128((__m128i *)(schedule->words + KAPPA_IN), spread(first, 12));
    const __m128i last = out_of_basis_128(_mm_shuffle_epi32(_mm_load_si128((const __m128i *)(kappa + 32)), 0x1b));
    __m128i *to = (__m128i *)(schedule->words + KAPPA_OUT);
    _mm_storeu_si128(to, spread(last, 0));
    _mm_storeu_si128(to + 1, spread(last, 4));
    _mm_storeu_si128(to + 2, spread(last, 8));
    _mm_storeu_si128(to + 3, spread(last, 12));
    for (size_t i = 180; i < 192; i++)
        schedule->words[i] = 0;
    wipe_vectors(kappa, sizeof kappa / 32);
}

/* x + L'(S(z)): z and x hold one word in every lane. */
ALWAYS_INLINE __m128i key_round(__m128i x, __m128i z)
{
    __m128i y[4];
    substitute_key(z, y);
    x = _mm_xor_si128(x, _mm_set1_epi8((char)(KEY_ROUND_CONSTANT)));
    x = _mm_xor_si128(_mm_xor_si128(x, y[0]), rotate_bytes(y[1], 1));
    return _mm_xor_si128(x, _mm_xor_si128(rotate_bytes(y[2], 2), rotate_bytes(y[3], 3)));
}

/* P CK[i] in every word. */
ALWAYS_INLINE __m128i key_constant(size_t i)
{
    uint32_t ck;
    memcpy(&ck, csvf__sm4_ck + 4 * i, 4);
    return _mm_set1_epi32((int)ck);
}

static void expand(csvf_sm4_schedule *enc, csvf_sm4_schedule *dec, const uint8_t key[16])
{
    uint32_t keys[64] __attribute__((aligned(32)));
    __m128i k = into_basis_128(_mm_loadu_si128((const __m128i *)key));
    k = _mm_xor_si128(k, _mm_load_si128((const __m128i *)csvf__sm4_fk));
    /* Every word carries INPUT_CONSTANT, so the sum of three does, and so does every later word. */
    k = _mm_xor_si128(k, _mm_set1_epi8(CSVF_SM4_INPUT_CONSTANT));
    __m128i x0 = _mm_shuffle_epi32(k, 0x00), x1 = _mm_shuffle_epi32(k, 0x55);
    __m128i x2 = _mm_shuffle_epi32(k, 0xaa), x3 = _mm_shuffle_epi32(k, 0xff);
#define KEY_ROUND(a, b, c, d, i)                                                                                             \
    a = key_round(a, _mm_xor_si128(_mm_xor_si128(_mm_xor_si128(b, key_constant(i)), c), d));                                 \
    keys[i] = keys[63 - (i)] = (uint32_t)_mm_cvtsi128_si32(a);
    for (size_t i = 0; i < 32; i += 4) {
        KEY_ROUND(x0, x1, x2, x3, i)
        KEY_ROUND(x1, x2, x3, x0, i + 1)
        KEY_ROUND(x2, x3, x0, x1, i + 2)
        KEY_ROUND(x3, x0, x1, x2, i + 3)
    }
#undef KEY_ROUND
    fill_schedule(enc, keys);
    if (dec)
        fill_schedule(dec, keys + 32);
    wipe_vectors(keys, sizeof keys / 32);
}
