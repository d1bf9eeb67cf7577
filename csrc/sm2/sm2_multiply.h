/* Multiples of points: the operations of csvf_sm2_kernel, written once over the arithmetic of the including kernel. Internal; PURE.
 *
 * Windows are signed (Booth): the digit of window w comes from its b bits and the one below, lies in -2^(b-1) .. 2^(b-1), and the sum of
 * digit * 2^(b w) is the scalar. */
#ifndef CSVF_SM2_MULTIPLY_H
#define CSVF_SM2_MULTIPLY_H

#include "sm2_points.h"
#include "sm2_scalar.h"

/* Magnitude of the digit whose lowest bit is `position`; *sign = all ones if it is negative. Position and bits are public. */
static inline uint64_t booth_digit(uint64_t *sign, const uint64_t scalar[4], unsigned position, unsigned bits)
{
    const unsigned limb = position / 64, shift = position % 64;
    uint64_t word = scalar[limb] >> shift;
    if (shift && limb < 3)
        word |= scalar[limb + 1] << (64 - shift);
    const uint64_t below = position ? scalar[(position - 1) / 64] >> (position - 1) % 64 & 1 : 0;
    word = (word << 1 | below) & ((UINT64_C(2) << bits) - 1);
    *sign = number_hide(0 - (word >> bits));
    word = ((word ^ *sign) & ((UINT64_C(2) << bits) - 1));
    return (word >> 1) + (word & 1);
}

/* No addition below meets equal or opposite points, so that none is needed to look for them: before window w the accumulator is
 * A = sum of digit_v 2^(7 v) over v < w with |A| <= 64 (2^(7 w) - 1) / 127 < 2^(7 w), and the term is T = digit 2^(7 w), digit != 0, so that as
 * integers A != T and A != -T. For w < 36 both lie below 2^252 < n / 2: no multiple of n comes between. For w = 36 (digit 1 .. 16, A + T = k):
 * A = -T mod n would mean k = 0 mod n, excluded; A = T mod n would mean k = 2 T - n, that is A = T - n, but |A| <= 2^252 64/127 and T - n is
 * above -2^252 64/127 for digit 16 only, where k = T + A = 2^257 - n > n, excluded too. What remains, A or T infinite, is selected. */
static void multiply_base(csvf_sm2_affine *out, const uint64_t scalar[4])
{
    jacobian sum, added;
    csvf_sm2_affine entry;
    memset(&sum, 0, sizeof sum);
    for (unsigned w = 0; w < CSVF_SM2_BASE_WINDOWS; w++) {
        uint64_t sign;
        const uint64_t digit = booth_digit(&sign, scalar, CSVF_SM2_BASE_BITS * w, CSVF_SM2_BASE_BITS);
        table_select(entry.x, csvf__sm2_base_table[CSVF_SM2_BASE_ENTRIES * w].x, 8, CSVF_SM2_BASE_ENTRIES, digit);
        field_negate_if(entry.y, entry.y, sign);
        const uint64_t sum_is_infinite = number_is_zero(sum.z), keep = number_mask_zero(digit);
        point_add_mixed(&added, &sum, &entry);
        number_select(added.x, sum_is_infinite, entry.x, added.x);
        number_select(added.y, sum_is_infinite, entry.y, added.y);
        number_select(added.z, sum_is_infinite, field_one, added.z);
        point_select(&sum, keep, &sum, &added);
    }
    (void)point_to_affine(out, &sum);
    csvf_wipe(&sum, sizeof sum);
    csvf_wipe(&added, sizeof added);
    csvf_wipe(&entry, sizeof entry);
}

enum { MULTIPLY_BITS = 5, MULTIPLY_WINDOWS = 52, MULTIPLY_ENTRIES = 16 };

/* The scalar k is replaced by m = min(k, n - k) <= (n - 1) / 2 and the result's sign turned, so that no addition meets equal or opposite
 * points: before window w the accumulator is 32 a P and the term d P, |d| <= 16, with 0 <= 32 a + d <= (n + 1) / 2 (Booth rounds a prefix up by at
 * most 1). As integers 32 a = d or -d only if both are 0, and 32 a - d, 32 a + d stay within -16 .. n / 2 + 48: no multiple of n but 0. */
static int multiply(csvf_sm2_affine *out, const csvf_sm2_affine *point, const uint64_t scalar[4])
{
    static const uint64_t half[4] = {0xa9ddfa049ceaa091, 0xb901efb590e30295, 0xffffffffffffffff, 0x7fffffff7fffffff};   /* (n - 1) / 2 */
    jacobian table[MULTIPLY_ENTRIES], sum, added, entry;
    uint64_t small[4], sign;
    const uint64_t is_large = number_is_below(half, scalar);
    (void)number_subtract(small, csvf__sm2_n, scalar);
    number_select(small, is_large, small, scalar);

    memcpy(table[0].x, point->x, sizeof table[0].x);
    memcpy(table[0].y, point->y, sizeof table[0].y);
    memcpy(table[0].z, field_one, sizeof table[0].z);
    for (int i = 1; i < MULTIPLY_ENTRIES; i += 2) {
        point_double(&table[i], &table[i / 2]);
        if (i + 1 < MULTIPLY_ENTRIES)
            point_add_mixed(&table[i + 1], &table[i], point);
    }
    uint64_t digit = booth_digit(&sign, small, MULTIPLY_BITS * (MULTIPLY_WINDOWS - 1), MULTIPLY_BITS);   /* 0 or 1 */
    table_select(sum.x, table[0].x, 12, MULTIPLY_ENTRIES, digit);
    for (unsigned w = MULTIPLY_WINDOWS - 1; w-- > 0;) {
        for (unsigned i = 0; i < MULTIPLY_BITS; i++)
            point_double(&sum, &sum);
        digit = booth_digit(&sign, small, MULTIPLY_BITS * w, MULTIPLY_BITS);
        table_select(entry.x, table[0].x, 12, MULTIPLY_ENTRIES, digit);
        field_negate_if(entry.y, entry.y, sign);
        const uint64_t sum_is_infinite = number_is_zero(sum.z), keep = number_mask_zero(digit);
        point_add(&added, &sum, &entry);
        point_select(&added, sum_is_infinite, &entry, &added);
        point_select(&sum, keep, &sum, &added);
    }
    field_negate_if(sum.y, sum.y, is_large);
    const int finite = point_to_affine(out, &sum);
    csvf_wipe(table, sizeof table);
    csvf_wipe(&sum, sizeof sum);
    csvf_wipe(&added, sizeof added);
    csvf_wipe(&entry, sizeof entry);
    csvf_wipe(small, sizeof small);
    return finite;
}

/* ---- Public scalars ---------------------------------------------------------------------------------------------------- */

/* Adds scalar * P out of a table of windows. */
static void add_windows_var(jacobian *sum, const csvf_sm2_affine *table, unsigned bits, unsigned windows, const uint64_t scalar[4])
{
    for (unsigned w = 0; w < windows; w++) {
        uint64_t sign;
        const uint64_t digit = booth_digit(&sign, scalar, bits * w, bits);
        if (digit)
            point_add_mixed_var(sum, &table[((size_t)w << (bits - 1)) + digit - 1], (int)(sign & 1));
    }
}

enum { WNAF_BITS = 5, WNAF_ENTRIES = 8 };

/* Width-5 non-adjacent form: digits odd in -15 .. 15 or 0. Returns how many. */
static int wnaf_var(int8_t digits[257], const uint64_t scalar[4])
{
    uint64_t k[5] = {scalar[0], scalar[1], scalar[2], scalar[3], 0};
    int count = 0, position = 0;
    uint64_t carry = 0;
    memset(digits, 0, 257);
    while (position < 257) {
        const uint64_t bit = k[position / 64] >> position % 64 & 1;
        if (bit == carry) {
            position++;
            continue;
        }
        const int limb = position / 64, shift = position % 64;
        uint64_t word = k[limb] >> shift;
        if (shift > 64 - WNAF_BITS && limb < 4)
            word |= k[limb + 1] << (64 - shift);
        int digit = (int)((word & ((1u << WNAF_BITS) - 1)) + carry);
        carry = digit >> (WNAF_BITS - 1) & 1;
        digit -= (int)carry << WNAF_BITS;
        digits[position] = (int8_t)digit;
        count = position + 1;
        position += WNAF_BITS;
    }
    return count;
}

static void multiply_var(jacobian *out, const csvf_sm2_affine *point, const uint64_t scalar[4])
{
    jacobian odd[WNAF_ENTRIES], twice;     /* P, 3 P, ... 15 P */
    int8_t digits[257];
    memcpy(odd[0].x, point->x, sizeof odd[0].x);
    memcpy(odd[0].y, point->y, sizeof odd[0].y);
    memcpy(odd[0].z, field_one, sizeof odd[0].z);
    point_double(&twice, &odd[0]);
    point_add_mixed(&odd[1], &twice, point);
    for (int i = 2; i < WNAF_ENTRIES; i++)
        point_add(&odd[i], &odd[i - 1], &twice);
    memset(out, 0, sizeof *out);
    for (int i = wnaf_var(digits, scalar); i-- > 0;) {
        point_double(out, out);
        if (digits[i])
            point_add_var(out, &odd[(digits[i] < 0 ? -digits[i] : digits[i]) / 2], digits[i] < 0);
    }
}

static int verify_var(const uint64_t s[4], const uint64_t t[4], const csvf_sm2_affine *point, const csvf_sm2_table *table,
                      const uint64_t x_mod_n[4])
{
    static const uint64_t p_less_n[4] = {0xac440bf6c62abedc, 0x8dfc2093de39fad5, 0, 0};
    jacobian sum;
    if (table) {
        memset(&sum, 0, sizeof sum);
        add_windows_var(&sum, table->entries, CSVF_SM2_KEY_BITS, CSVF_SM2_KEY_WINDOWS, t);
    } else
        multiply_var(&sum, point, t);
    add_windows_var(&sum, csvf__sm2_base_table, CSVF_SM2_BASE_BITS, CSVF_SM2_BASE_WINDOWS, s);
    if (number_is_zero(sum.z))
        return 0;
    /* x / 2^256 * Z^2 = X tells without inversion; the field has more elements than the group, so x may also be x_mod_n + n. */
    uint64_t z_squared[4], wanted[4], x[4];
    field_square(z_squared, sum.z);
    field_multiply(z_squared, z_squared, (const uint64_t[4]){0x0000000200000003, 0x00000002ffffffff, 0x0000000100000001, 0x0000000400000002});
    field_multiply(wanted, z_squared, x_mod_n);
    if (number_is_equal(wanted, sum.x))
        return 1;
    if (!number_is_below(x_mod_n, p_less_n))
        return 0;
    (void)number_add(x, x_mod_n, csvf__sm2_n);
    field_multiply(wanted, z_squared, x);
    return number_is_equal(wanted, sum.x) != 0;
}

/* Affine forms of `count` finite points with one inversion: out[i] has x and y of Jacobian points in place, z[i] its Z. */
static void normalise_var(csvf_sm2_affine *points, const uint64_t (*z)[4], uint64_t (*products)[4], size_t count)
{
    uint64_t inverse[4], z_inverse[4], t[4];
    memcpy(products[0], z[0], sizeof products[0]);
    for (size_t i = 1; i < count; i++)
        field_multiply(products[i], products[i - 1], z[i]);
    field_invert(inverse, products[count - 1]);
    for (size_t i = count; i-- > 0;) {
        if (i)
            field_multiply(z_inverse, inverse, products[i - 1]);
        else
            memcpy(z_inverse, inverse, sizeof inverse);
        field_multiply(inverse, inverse, z[i]);
        field_square(t, z_inverse);
        field_multiply(points[i].x, points[i].x, t);
        field_multiply(t, t, z_inverse);
        field_multiply(points[i].y, points[i].y, t);
    }
}

/* Every multiple here is i 2^(6 w) P with 0 < i <= 32: i 2^(6 w) P = +-2^(6 w) P only for i = 1 (n is prime), which is doubled. */
static void fill_table_var(csvf_sm2_table *table, const csvf_sm2_affine *point)
{
    enum { GROUP = 8 };     /* windows that share an inversion: 16 KiB of stack */
    uint64_t z[GROUP * CSVF_SM2_KEY_ENTRIES][4], products[GROUP * CSVF_SM2_KEY_ENTRIES][4];
    csvf_sm2_affine first[CSVF_SM2_KEY_WINDOWS];
    jacobian sum;
    table->point = first[0] = *point;
    memcpy(sum.x, point->x, sizeof sum.x);
    memcpy(sum.y, point->y, sizeof sum.y);
    memcpy(sum.z, field_one, sizeof sum.z);
    for (size_t w = 1; w < CSVF_SM2_KEY_WINDOWS; w++) {
        for (int i = 0; i < CSVF_SM2_KEY_BITS; i++)
            point_double(&sum, &sum);
        memcpy(&first[w], &sum, sizeof first[w]);
        memcpy(z[w], sum.z, sizeof sum.z);
    }
    normalise_var(first + 1, (const uint64_t (*)[4])(z + 1), products + 1, CSVF_SM2_KEY_WINDOWS - 1);
    for (size_t start = 0; start < CSVF_SM2_KEY_WINDOWS; start += GROUP) {
        const size_t windows = CSVF_SM2_KEY_WINDOWS - start < GROUP ? CSVF_SM2_KEY_WINDOWS - start : GROUP;
        csvf_sm2_affine *entries = table->entries + CSVF_SM2_KEY_ENTRIES * start;
        for (size_t i = 0; i < windows * CSVF_SM2_KEY_ENTRIES; i++) {
            const csvf_sm2_affine *base = &first[start + i / CSVF_SM2_KEY_ENTRIES];
            if (i % CSVF_SM2_KEY_ENTRIES == 0) {
                memcpy(sum.x, base->x, sizeof sum.x);
                memcpy(sum.y, base->y, sizeof sum.y);
                memcpy(sum.z, field_one, sizeof sum.z);
            } else if (i % CSVF_SM2_KEY_ENTRIES == 1)
                point_double(&sum, &sum);
            else
                point_add_mixed(&sum, &sum, base);
            memcpy(&entries[i], &sum, sizeof entries[i]);
            memcpy(z[i], sum.z, sizeof sum.z);
        }
        normalise_var(entries, (const uint64_t (*)[4])z, products, windows * CSVF_SM2_KEY_ENTRIES);
    }
}

/* out = point + scalar * other; returns 0 for infinity. */
static int combine_var(csvf_sm2_affine *out, const csvf_sm2_affine *point, const csvf_sm2_affine *other, const uint64_t scalar[4])
{
    jacobian sum;
    multiply_var(&sum, other, scalar);
    point_add_mixed_var(&sum, point, 0);
    return point_to_affine(out, &sum);
}

static void field_multiply_call(uint64_t out[4], const uint64_t a[4], const uint64_t b[4]) { field_multiply(out, a, b); }

#endif
