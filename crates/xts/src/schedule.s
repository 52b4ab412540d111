# Key expansion of AES-256 (FIPS 197, 5.2) for both halves of an XTS key, with no stack and all registers zero at the end.
#
#   rdi  64 bytes of key        rsi  three schedules: data key to encrypt, data key to decrypt, tweak key
#
# Each round key lies there four times side by side, as often as the widest register holds it.
    .ifndef VMSEAL_SCHEDULE
    .set VMSEAL_SCHEDULE, 1

    .macro vmseal_put at, key
    vmovdqa [rsi + \at], \key
    vmovdqa [rsi + \at + 16], \key
    vmovdqa [rsi + \at + 32], \key
    vmovdqa [rsi + \at + 48], \key
    .endm

# The round key two rounds on: each word plus all words before it, plus the given one.
    .macro vmseal_next key, with
    vpslldq xmm3, \key, 4
    vpxor \key, \key, xmm3
    vpslldq xmm3, \key, 8
    vpxor \key, \key, xmm3
    vpxor \key, \key, \with
    .endm

    .macro vmseal_two_rounds at, constant
    vaeskeygenassist xmm2, xmm1, \constant
    vpshufd xmm2, xmm2, 0xff
    vmseal_next xmm0, xmm2
    vmseal_put \at, xmm0
    .if \constant != 0x40
    vaeskeygenassist xmm2, xmm0, 0
    vpshufd xmm2, xmm2, 0xaa
    vmseal_next xmm1, xmm2
    vmseal_put \at + 64, xmm1
    .endif
    .endm

    .macro vmseal_expand from, at
    vmovdqu xmm0, [rdi + \from]
    vmovdqu xmm1, [rdi + \from + 16]
    vmseal_put \at, xmm0
    vmseal_put \at + 64, xmm1
    vmseal_two_rounds \at + 64*2, 0x01
    vmseal_two_rounds \at + 64*4, 0x02
    vmseal_two_rounds \at + 64*6, 0x04
    vmseal_two_rounds \at + 64*8, 0x08
    vmseal_two_rounds \at + 64*10, 0x10
    vmseal_two_rounds \at + 64*12, 0x20
    vmseal_two_rounds \at + 64*14, 0x40
    .endm

    .macro vmseal_schedules
    vmseal_expand 0, 0
    vmseal_expand 32, 64*30
    vmovdqa xmm0, [rsi + 64*14]
    vmseal_put 64*15, xmm0
    .irp round, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13
    vaesimc xmm0, [rsi + 64*14 - 64*\round]
    vmseal_put 64*15 + 64*\round, xmm0
    .endr
    vmovdqa xmm0, [rsi]
    vmseal_put 64*29, xmm0
    vzeroall
    ret
    .endm

    .endif
