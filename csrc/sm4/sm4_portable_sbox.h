/* SM4 S-box as a circuit of 110 gates. Written by csrc/tools/sm4_bitslice.py, which holds
 * the derivation and checks all 256 inputs; do not edit.
 *
 * Computes o = S(x + INPUT) + OUTPUT on bit planes of type CSVF_SBOX_WORD (define it before use; any type with
 * ^ and &), bit 0 being the least significant of the byte. The key schedule absorbs the constants. */
#ifndef CSVF_SM4_PORTABLE_SBOX_H
#define CSVF_SM4_PORTABLE_SBOX_H

#define CSVF_SBOX_INPUT 0x75u
#define CSVF_SBOX_OUTPUT 0xd3u

#define CSVF_SBOX(x0, x1, x2, x3, x4, x5, x6, x7, o0, o1, o2, o3, o4, o5, o6, o7) \
    do { \
        const CSVF_SBOX_WORD a3 = x5 ^ x3; \
        const CSVF_SBOX_WORD y12 = a3 ^ x0; \
        const CSVF_SBOX_WORD y16 = a3 ^ x6; \
        const CSVF_SBOX_WORD y13 = y12 ^ x1; \
        const CSVF_SBOX_WORD y9 = x6 ^ x2; \
        const CSVF_SBOX_WORD t7 = y13 & y16; \
        const CSVF_SBOX_WORD t12 = y9 & x6; \
        const CSVF_SBOX_WORD y21 = y13 ^ y16; \
        const CSVF_SBOX_WORD a10 = y21 ^ x4; \
        const CSVF_SBOX_WORD y19 = a10 ^ x1; \
        const CSVF_SBOX_WORD y1 = y9 ^ x7; \
        const CSVF_SBOX_WORD y7 = y16 ^ y1; \
        const CSVF_SBOX_WORD y18 = y19 ^ x5; \
        const CSVF_SBOX_WORD y2 = y18 ^ y7; \
        const CSVF_SBOX_WORD t10 = y2 & y7; \
        const CSVF_SBOX_WORD y10 = a10 ^ y9; \
        const CSVF_SBOX_WORD y6 = a10 ^ x7; \
        const CSVF_SBOX_WORD y8 = y9 ^ x1; \
        const CSVF_SBOX_WORD y17 = a10 ^ x2; \
        const CSVF_SBOX_WORD t11 = t10 ^ t7; \
        const CSVF_SBOX_WORD t13 = x1 & y17; \
        const CSVF_SBOX_WORD y0 = a3 ^ y1; \
        const CSVF_SBOX_WORD y5 = y2 ^ y13; \
        const CSVF_SBOX_WORD t15 = y8 & y10; \
        const CSVF_SBOX_WORD t16 = t15 ^ t12; \
        const CSVF_SBOX_WORD t14 = t13 ^ t12; \
        const CSVF_SBOX_WORD t8 = y5 & y1; \
        const CSVF_SBOX_WORD y4 = y2 ^ y9; \
        const CSVF_SBOX_WORD t9 = t8 ^ t7; \
        const CSVF_SBOX_WORD t19 = t9 ^ t14; \
        const CSVF_SBOX_WORD y3 = y5 ^ y8; \
        const CSVF_SBOX_WORD t23 = t19 ^ y21; \
        const CSVF_SBOX_WORD t3 = y3 & y6; \
        const CSVF_SBOX_WORD y15 = y6 ^ y0; \
        const CSVF_SBOX_WORD t2 = y12 & y15; \
        const CSVF_SBOX_WORD t4 = t3 ^ t2; \
        const CSVF_SBOX_WORD t17 = t4 ^ t14; \
        const CSVF_SBOX_WORD t5 = y4 & y0; \
        const CSVF_SBOX_WORD t6 = t5 ^ t2; \
        const CSVF_SBOX_WORD t18 = t6 ^ t16; \
        const CSVF_SBOX_WORD t21 = t17 ^ x2; \
        const CSVF_SBOX_WORD t26 = t21 & t23; \
        const CSVF_SBOX_WORD t22 = t18 ^ y19; \
        const CSVF_SBOX_WORD t31 = t22 ^ t26; \
        const CSVF_SBOX_WORD t20 = t11 ^ t16; \
        const CSVF_SBOX_WORD t24 = t20 ^ y18; \
        const CSVF_SBOX_WORD t25 = t21 ^ t22; \
        const CSVF_SBOX_WORD t30 = t23 ^ t24; \
        const CSVF_SBOX_WORD t32 = t31 & t30; \
        const CSVF_SBOX_WORD t27 = t24 ^ t26; \
        const CSVF_SBOX_WORD t33 = t32 ^ t24; \
        const CSVF_SBOX_WORD t34 = t23 ^ t33; \
        const CSVF_SBOX_WORD z2 = t33 & y0; \
        const CSVF_SBOX_WORD t35 = t27 ^ t33; \
        const CSVF_SBOX_WORD t36 = t24 & t35; \
        const CSVF_SBOX_WORD t28 = t25 & t27; \
        const CSVF_SBOX_WORD t38 = t27 ^ t36; \
        const CSVF_SBOX_WORD z11 = t33 & y4; \
        const CSVF_SBOX_WORD t37 = t36 ^ t34; \
        const CSVF_SBOX_WORD t29 = t28 ^ t22; \
        const CSVF_SBOX_WORD z14 = t29 & y2; \
        const CSVF_SBOX_WORD z5 = t29 & y7; \
        const CSVF_SBOX_WORD t42 = t29 ^ t33; \
        const CSVF_SBOX_WORD t39 = t29 & t38; \
        const CSVF_SBOX_WORD t40 = t25 ^ t39; \
        const CSVF_SBOX_WORD t41 = t40 ^ t37; \
        const CSVF_SBOX_WORD z8 = t41 & y10; \
        const CSVF_SBOX_WORD t44 = t33 ^ t37; \
        const CSVF_SBOX_WORD t43 = t29 ^ t40; \
        const CSVF_SBOX_WORD z17 = t41 & y8; \
        const CSVF_SBOX_WORD b20 = z5 ^ z2; \
        const CSVF_SBOX_WORD z4 = t40 & y1; \
        const CSVF_SBOX_WORD b9 = z17 ^ z14; \
        const CSVF_SBOX_WORD b6 = z11 ^ z14; \
        const CSVF_SBOX_WORD t45 = t42 ^ t41; \
        const CSVF_SBOX_WORD z3 = t43 & y16; \
        const CSVF_SBOX_WORD z0 = t44 & y15; \
        const CSVF_SBOX_WORD b1 = z8 ^ z2; \
        const CSVF_SBOX_WORD z12 = t43 & y13; \
        const CSVF_SBOX_WORD b0 = z3 ^ z0; \
        const CSVF_SBOX_WORD b21 = b20 ^ b0; \
        const CSVF_SBOX_WORD b3 = z4 ^ b0; \
        const CSVF_SBOX_WORD z6 = t42 & x6; \
        const CSVF_SBOX_WORD z15 = t42 & y9; \
        const CSVF_SBOX_WORD z7 = t45 & y17; \
        const CSVF_SBOX_WORD z9 = t44 & y12; \
        const CSVF_SBOX_WORD b2 = z7 ^ b1; \
        const CSVF_SBOX_WORD b4 = b3 ^ b2; \
        const CSVF_SBOX_WORD z13 = t40 & y5; \
        const CSVF_SBOX_WORD b15 = z15 ^ z12; \
        const CSVF_SBOX_WORD b5 = z13 ^ b4; \
        const CSVF_SBOX_WORD z16 = t45 & x1; \
        const CSVF_SBOX_WORD b11 = z6 ^ z0; \
        const CSVF_SBOX_WORD b17 = z16 ^ b5; \
        const CSVF_SBOX_WORD b16 = b15 ^ b9; \
        const CSVF_SBOX_WORD b10 = z9 ^ z12; \
        const CSVF_SBOX_WORD b12 = b11 ^ b1; \
        const CSVF_SBOX_WORD z10 = t37 & y3; \
        const CSVF_SBOX_WORD b7 = z10 ^ b5; \
        const CSVF_SBOX_WORD b8 = b6 ^ b7; \
        const CSVF_SBOX_WORD z1 = t37 & y6; \
        const CSVF_SBOX_WORD b19 = z1 ^ b2; \
        const CSVF_SBOX_WORD b18 = b17 ^ b9; \
        o4 = b8; \
        const CSVF_SBOX_WORD b13 = b12 ^ b7; \
        const CSVF_SBOX_WORD b14 = b13 ^ b10; \
        o1 = b4 ^ b16; \
        o0 = b14; \
        o3 = b16; \
        o6 = b21 ^ b18; \
        o2 = b14 ^ b18; \
        o7 = b6 ^ b10; \
        o5 = b19 ^ b8; \
    } while (0)

#endif
