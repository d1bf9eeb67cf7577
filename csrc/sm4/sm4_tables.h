/* Constants of the vector SM4 kernels. Made by tools/sm4_tables.py, which derives and checks them; do not edit.
 *
 * None of these tables is ever indexed by a secret: they are whole vector operands, or indexed by public shift counts.
 *
 * Matrices are operands of gf2p8affineqb / gf2p8affineinvqb. State bytes are kept as P x + kappa (see the generator):
 *   P, P_INVERSE       into and out of the state's basis
 *   U, W, V = U + W    S-box output matrix with the linear layer, for bytes already inverted by gf2p8affineinvqb:
 *                      byte b of L(S) = u[b] + w[b+1] + v[b+2] + v[b+3] + LINEAR_CONSTANT (byte 0 least significant, indices modulo 4)
 *   KEY_0..KEY_3       the same for the key schedule: byte b of L'(S) = sum over k of KEY_k y[b-k], + KEY_CONSTANT
 *   INPUT_CONSTANT     the S-box is OUT inv(P x + INPUT_CONSTANT) + 0xd3
 *   *_AES_LOW/_HIGH    nibble tables for pshufb of the same matrices for bytes that come from aesenclast (zero round key); *_AES_CONSTANT
 *                      is what the 0x63 of the AES S-box adds, and P_LOW/.. the plain matrices;
 *                      aes_of_out takes a change of the SM4 S-box's output to the change of aesenclast's output that causes it
 * Tweak tables, one set per standard, s = 0..7 the bits of a shift:
 *   shift_left[s]      what alpha^s leaves in a byte; shift_over[s] what it hands to the next byte
 *   wrap_low[s], wrap_high[s]  what shift_over of byte 15 adds to bytes 0 and 1 (through x^128 = x^7 + x^2 + x + 1)
 *   FOLD_LOW, FOLD_HIGH  x^128 times a byte: its low byte, and what it hands to the next byte
 *   gather[16 m + k]   byte k of T x^(8 m) as an index into T | G | L | Z, where L = FOLD_LOW T, G[n] = L[n] + FOLD_HIGH T[n-1],
 *                      Z[0] = T[0] + FOLD_HIGH T[15]; the same for both standards
 *   gather_columns[8 k + m]  the same for m < 8, eight neighbours for one byte k */
#ifndef CSVF_SM4_TABLES_H
#define CSVF_SM4_TABLES_H

#include <stdint.h>

/* A kernel uses some of the tables only. */
#define CSVF_SM4_TABLE(alignment) static const __attribute__((aligned(alignment), unused))

#define CSVF_SM4_P UINT64_C(0x4c287db91a22505d)
#define CSVF_SM4_P_INVERSE UINT64_C(0xb3a4f5863284728b)
#define CSVF_SM4_U UINT64_C(0x040db891e9a481b7)
#define CSVF_SM4_W UINT64_C(0x280fbcb4ff84c11a)
#define CSVF_SM4_V UINT64_C(0x2c020425162040ad)
#define CSVF_SM4_KEY_0 UINT64_C(0x280f0901760dc1af)
#define CSVF_SM4_KEY_1 UINT64_C(0xabf358c700f3abab)
#define CSVF_SM4_KEY_2 UINT64_C(0x13b5336648748933)
#define CSVF_SM4_KEY_3 UINT64_C(0x54c1eccce6812f59)
#define CSVF_SM4_INPUT_CONSTANT 0x3e
#define CSVF_SM4_LINEAR_CONSTANT 0x63
#define CSVF_SM4_KEY_CONSTANT 0xc5

/* P applied to the bytes of the system parameter FK and of the constants CK (GB/T 32907-2016 7.3), most significant byte of each word first. */
CSVF_SM4_TABLE(16) uint8_t csvf__sm4_fk[16] = {
    154, 118, 85, 120, 172, 137, 78, 25, 210, 161, 88, 237, 202, 55, 30, 11};
CSVF_SM4_TABLE(64) uint8_t csvf__sm4_ck[128] = {
    0, 57, 42, 213, 198, 146, 129, 126, 109, 84, 112, 83, 156, 58, 219, 248,
    55, 14, 29, 1, 18, 104, 123, 170, 185, 128, 79, 108, 72, 238, 33, 2,
    227, 218, 201, 54, 37, 188, 175, 80, 67, 122, 155, 184, 119, 209, 245, 214,
    25, 32, 51, 226, 241, 139, 152, 132, 151, 174, 97, 66, 163, 5, 202, 233,
    205, 244, 231, 24, 11, 95, 76, 179, 160, 153, 181, 150, 89, 255, 30, 61,
    242, 203, 216, 204, 223, 165, 182, 103, 116, 77, 130, 161, 141, 43, 228, 199,
    38, 31, 12, 243, 224, 113, 98, 157, 142, 183, 86, 117, 186, 28, 48, 19,
    220, 229, 246, 39, 52, 78, 93, 73, 90, 99, 172, 143, 110, 200, 7, 36};

/* AES-NI */
CSVF_SM4_TABLE(16) uint8_t csvf__sm4_u_aes_low[16] = {
    0, 134, 211, 85, 120, 254, 171, 45, 28, 154, 207, 73, 100, 226, 183, 49};
CSVF_SM4_TABLE(16) uint8_t csvf__sm4_u_aes_high[16] = {
    0, 235, 220, 55, 240, 27, 44, 199, 205, 38, 17, 250, 61, 214, 225, 10};
#define CSVF_SM4_U_AES_CONSTANT 0x79
CSVF_SM4_TABLE(16) uint8_t csvf__sm4_w_aes_low[16] = {
    0, 85, 222, 139, 216, 141, 6, 83, 94, 11, 128, 213, 134, 211, 88, 13};
CSVF_SM4_TABLE(16) uint8_t csvf__sm4_w_aes_high[16] = {
    0, 95, 149, 202, 114, 45, 231, 184, 113, 46, 228, 187, 3, 92, 150, 201};
#define CSVF_SM4_W_AES_CONSTANT 0x6c
CSVF_SM4_TABLE(16) uint8_t csvf__sm4_key0_aes_low[16] = {
    0, 101, 98, 7, 216, 189, 186, 223, 210, 183, 176, 213, 10, 111, 104, 13};
CSVF_SM4_TABLE(16) uint8_t csvf__sm4_key0_aes_high[16] = {
    0, 227, 25, 250, 66, 161, 91, 184, 205, 46, 212, 55, 143, 108, 150, 117};
#define CSVF_SM4_KEY_0_AES_CONSTANT 0x5c
CSVF_SM4_TABLE(16) uint8_t csvf__sm4_key1_aes_low[16] = {
    0, 0, 197, 197, 205, 205, 8, 8, 227, 227, 38, 38, 46, 46, 235, 235};
CSVF_SM4_TABLE(16) uint8_t csvf__sm4_key1_aes_high[16] = {
    0, 0, 0, 0, 38, 38, 38, 38, 0, 0, 0, 0, 38, 38, 38, 38};
#define CSVF_SM4_KEY_1_AES_CONSTANT 0xe3
CSVF_SM4_TABLE(16) uint8_t csvf__sm4_key2_aes_low[16] = {
    0, 229, 207, 42, 57, 220, 246, 19, 18, 247, 221, 56, 43, 206, 228, 1};
CSVF_SM4_TABLE(16) uint8_t csvf__sm4_key2_aes_high[16] = {
    0, 198, 175, 105, 104, 174, 199, 1, 67, 133, 236, 42, 43, 237, 132, 66};
#define CSVF_SM4_KEY_2_AES_CONSTANT 0xed
CSVF_SM4_TABLE(16) uint8_t csvf__sm4_key3_aes_low[16] = {
    0, 3, 226, 225, 122, 121, 152, 155, 78, 77, 172, 175, 52, 55, 214, 213};
CSVF_SM4_TABLE(16) uint8_t csvf__sm4_key3_aes_high[16] = {
    0, 55, 177, 134, 239, 216, 94, 105, 235, 220, 90, 109, 4, 51, 181, 130};
#define CSVF_SM4_KEY_3_AES_CONSTANT 0xbf
CSVF_SM4_TABLE(16) uint8_t csvf__sm4_p_low[16] = {
    0, 140, 48, 188, 133, 9, 181, 57, 159, 19, 175, 35, 26, 150, 42, 166};
CSVF_SM4_TABLE(16) uint8_t csvf__sm4_p_high[16] = {
    0, 220, 46, 242, 197, 25, 235, 55, 8, 212, 38, 250, 205, 17, 227, 63};
CSVF_SM4_TABLE(16) uint8_t csvf__sm4_p_inverse_low[16] = {
    0, 133, 217, 92, 46, 171, 247, 114, 128, 5, 89, 220, 174, 43, 119, 242};
CSVF_SM4_TABLE(16) uint8_t csvf__sm4_p_inverse_high[16] = {
    0, 85, 87, 2, 68, 17, 19, 70, 175, 250, 248, 173, 235, 190, 188, 233};
CSVF_SM4_TABLE(16) uint8_t csvf__sm4_aes_of_out_low[16] = {
    0, 29, 179, 174, 204, 209, 127, 98, 49, 44, 130, 159, 253, 224, 78, 83};
CSVF_SM4_TABLE(16) uint8_t csvf__sm4_aes_of_out_high[16] = {
    0, 218, 144, 74, 250, 32, 106, 176, 122, 160, 234, 48, 128, 90, 16, 202};
/* undoes the ShiftRows of aesenclast (pshufb before it) */
CSVF_SM4_TABLE(16) uint8_t csvf__sm4_unshift_rows[16] = {
    0, 13, 10, 7, 4, 1, 14, 11, 8, 5, 2, 15, 12, 9, 6, 3};

/* tweaks */
CSVF_SM4_TABLE(64) uint8_t csvf__sm4_gather[256] = {
    0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,
    47, 48, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14,
    46, 31, 48, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13,
    45, 30, 31, 48, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,
    44, 29, 30, 31, 48, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11,
    43, 28, 29, 30, 31, 48, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10,
    42, 27, 28, 29, 30, 31, 48, 1, 2, 3, 4, 5, 6, 7, 8, 9,
    41, 26, 27, 28, 29, 30, 31, 48, 1, 2, 3, 4, 5, 6, 7, 8,
    40, 25, 26, 27, 28, 29, 30, 31, 48, 1, 2, 3, 4, 5, 6, 7,
    39, 24, 25, 26, 27, 28, 29, 30, 31, 48, 1, 2, 3, 4, 5, 6,
    38, 23, 24, 25, 26, 27, 28, 29, 30, 31, 48, 1, 2, 3, 4, 5,
    37, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 48, 1, 2, 3, 4,
    36, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 48, 1, 2, 3,
    35, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 48, 1, 2,
    34, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 48, 1,
    33, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 48};
CSVF_SM4_TABLE(64) uint8_t csvf__sm4_gather_columns[128] = {
    0, 47, 46, 45, 44, 43, 42, 41, 1, 48, 31, 30, 29, 28, 27, 26,
    2, 1, 48, 31, 30, 29, 28, 27, 3, 2, 1, 48, 31, 30, 29, 28,
    4, 3, 2, 1, 48, 31, 30, 29, 5, 4, 3, 2, 1, 48, 31, 30,
    6, 5, 4, 3, 2, 1, 48, 31, 7, 6, 5, 4, 3, 2, 1, 48,
    8, 7, 6, 5, 4, 3, 2, 1, 9, 8, 7, 6, 5, 4, 3, 2,
    10, 9, 8, 7, 6, 5, 4, 3, 11, 10, 9, 8, 7, 6, 5, 4,
    12, 11, 10, 9, 8, 7, 6, 5, 13, 12, 11, 10, 9, 8, 7, 6,
    14, 13, 12, 11, 10, 9, 8, 7, 15, 14, 13, 12, 11, 10, 9, 8};
#define CSVF_SM4_IEEE_FOLD_LOW UINT64_C(0x0103070e1c3870e1)
#define CSVF_SM4_IEEE_FOLD_HIGH UINT64_C(0xc284081020408000)
CSVF_SM4_TABLE(64) uint64_t csvf__sm4_ieee_shift_left[8] = {
    UINT64_C(0x0102040810204080), UINT64_C(0x0001020408102040), UINT64_C(0x0000010204081020), UINT64_C(0x0000000102040810),
    UINT64_C(0x0000000001020408), UINT64_C(0x0000000000010204), UINT64_C(0x0000000000000102), UINT64_C(0x0000000000000001)};
CSVF_SM4_TABLE(64) uint64_t csvf__sm4_ieee_shift_over[8] = {
    UINT64_C(0x0000000000000000), UINT64_C(0x8000000000000000), UINT64_C(0x4080000000000000), UINT64_C(0x2040800000000000),
    UINT64_C(0x1020408000000000), UINT64_C(0x0810204080000000), UINT64_C(0x0408102040800000), UINT64_C(0x0204081020408000)};
CSVF_SM4_TABLE(64) uint64_t csvf__sm4_ieee_wrap_low[8] = {
    UINT64_C(0x0000000000000000), UINT64_C(0x8080800000000080), UINT64_C(0x40c0c08000000040), UINT64_C(0x2060e0c080000020),
    UINT64_C(0x103070e0c0800010), UINT64_C(0x08183870e0c08008), UINT64_C(0x040c1c3870e0c084), UINT64_C(0x02060e1c3870e0c2)};
CSVF_SM4_TABLE(64) uint64_t csvf__sm4_ieee_wrap_high[8] = {
    UINT64_C(0x0000000000000000), UINT64_C(0x0000000000000000), UINT64_C(0x8000000000000000), UINT64_C(0x4080000000000000),
    UINT64_C(0x2040800000000000), UINT64_C(0x1020408000000000), UINT64_C(0x0810204080000000), UINT64_C(0x8408102040800000)};
#define CSVF_SM4_GB_FOLD_LOW UINT64_C(0x870e1c3870e0c080)
#define CSVF_SM4_GB_FOLD_HIGH UINT64_C(0x0001020408102143)
CSVF_SM4_TABLE(64) uint64_t csvf__sm4_gb_shift_left[8] = {
    UINT64_C(0x0102040810204080), UINT64_C(0x0204081020408000), UINT64_C(0x0408102040800000), UINT64_C(0x0810204080000000),
    UINT64_C(0x1020408000000000), UINT64_C(0x2040800000000000), UINT64_C(0x4080000000000000), UINT64_C(0x8000000000000000)};
CSVF_SM4_TABLE(64) uint64_t csvf__sm4_gb_shift_over[8] = {
    UINT64_C(0x0000000000000000), UINT64_C(0x0000000000000001), UINT64_C(0x0000000000000102), UINT64_C(0x0000000000010204),
    UINT64_C(0x0000000001020408), UINT64_C(0x0000000102040810), UINT64_C(0x0000010204081020), UINT64_C(0x0001020408102040)};
CSVF_SM4_TABLE(64) uint64_t csvf__sm4_gb_wrap_low[8] = {
    UINT64_C(0x0000000000000000), UINT64_C(0x0100000000010101), UINT64_C(0x0200000001030302), UINT64_C(0x0400000103070604),
    UINT64_C(0x08000103070e0c08), UINT64_C(0x100103070e1c1810), UINT64_C(0x2103070e1c383020), UINT64_C(0x43070e1c38706040)};
CSVF_SM4_TABLE(64) uint64_t csvf__sm4_gb_wrap_high[8] = {
    UINT64_C(0x0000000000000000), UINT64_C(0x0000000000000000), UINT64_C(0x0000000000000001), UINT64_C(0x0000000000000102),
    UINT64_C(0x0000000000010204), UINT64_C(0x0000000001020408), UINT64_C(0x0000000102040810), UINT64_C(0x0000010204081021)};

#endif
