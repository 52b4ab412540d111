# AES-256-XTS, half a kilobyte at a time: 32 blocks in eight registers of 64 bytes. What it computes is said in vaes512.rs.
#
# It has no stack but for one address: round keys come from the schedule in secret memory, one register at a time, and
# tweaks never leave the registers, all of which are zero at the end.
#
#   rdi  round keys of the data key, 64 bytes each      zmm0-7    data
#   rsi  source                                         zmm8-15   tweaks of the next half kilobyte, once this one began
#   rdx  destination                                    zmm16-23  tweaks of this one, with the last round key
#   rcx  units left                                     zmm24     a round key, or scratch between two rounds
#   r8   round keys of the tweak key                    zmm25     scratch
#   r9   half kilobytes of a unit                       zmm26     0x87, what x^128 is
#   r10  half kilobytes left of this unit               zmm27     encrypted numbers of this and the next units, rotating
#   r11  last half kilobyte of the source               zmm28     those of the four units after them
#   rax  encrypted numbers left in zmm27                zmm29-30  shifts by which lane n is multiplied by x^n
#   rbx  what to prefetch                               zmm31     numbers of the four units after those in zmm28
    .ifndef VMSEAL_VAES512
    .set VMSEAL_VAES512, 1

    .pushsection .rodata.vmseal_vaes512, "a", @progbits
    .p2align 6
.Lvmseal512_left:
    .quad 0, 0, 1, 1, 2, 2, 3, 3
.Lvmseal512_right:
    .quad 64, 64, 63, 63, 62, 62, 61, 61
.Lvmseal512_lanes:
    .quad 0, 0, 1, 0, 2, 0, 3, 0
.Lvmseal512_fours:
    .quad 4, 0, 4, 0, 4, 0, 4, 0
.Lvmseal512_polynomial:
    .quad 0x87, 0
    .popsection

# to = from * x^(8 * bytes); rest is 64 - 8 * bytes. What is shifted out fits 32 bits, so its product fits the low half.
    .macro vmseal512_times_bytes to, from, bytes, rest
    vpsrlq zmm25, \from, \rest
    vpclmulqdq zmm25, zmm25, zmm26, 0x01
    vpslldq \to, \from, \bytes
    vpxorq \to, \to, zmm25
    .endm

# What to do between two rounds when the next half kilobyte belongs to the same unit: all tweaks times x^32.
    .macro vmseal512_step round
    .if \round == 1
    vmseal512_times_bytes zmm8, zmm8, 4, 32
    .elseif \round == 2
    vmseal512_times_bytes zmm9, zmm9, 4, 32
    .elseif \round == 3
    vmseal512_times_bytes zmm10, zmm10, 4, 32
    .elseif \round == 4
    vmseal512_times_bytes zmm11, zmm11, 4, 32
    .elseif \round == 5
    vmseal512_times_bytes zmm12, zmm12, 4, 32
    .elseif \round == 6
    vmseal512_times_bytes zmm13, zmm13, 4, 32
    .elseif \round == 7
    vmseal512_times_bytes zmm14, zmm14, 4, 32
    .elseif \round == 8
    vmseal512_times_bytes zmm15, zmm15, 4, 32
    .endif
    .endm

# The same when it begins a unit: T in all lanes, times x^0..3, then x^4, then by bytes.
    .macro vmseal512_begin round
    .if \round == 1
    vshufi32x4 zmm8, zmm27, zmm27, 0
    vpsrlvq zmm25, zmm8, zmm30
    vpsllvq zmm8, zmm8, zmm29
    vpclmulqdq zmm24, zmm25, zmm26, 0x01
    vpslldq zmm25, zmm25, 8
    vpternlogq zmm8, zmm25, zmm24, 0x96
    .elseif \round == 2
    vshufi32x4 zmm27, zmm27, zmm27, 0x39
    .elseif \round == 3
    vpsrlq zmm25, zmm8, 60
    vpsllq zmm9, zmm8, 4
    vpclmulqdq zmm24, zmm25, zmm26, 0x01
    vpslldq zmm25, zmm25, 8
    vpternlogq zmm9, zmm25, zmm24, 0x96
    .elseif \round == 5
    vmseal512_times_bytes zmm10, zmm8, 1, 56
    .elseif \round == 6
    vmseal512_times_bytes zmm12, zmm8, 2, 48
    .elseif \round == 7
    vmseal512_times_bytes zmm14, zmm8, 3, 40
    .elseif \round == 8
    vmseal512_times_bytes zmm11, zmm9, 1, 56
    .elseif \round == 9
    vmseal512_times_bytes zmm13, zmm9, 2, 48
    .elseif \round == 10
    vmseal512_times_bytes zmm15, zmm9, 3, 40
    .endif
    .endm

    .macro vmseal512_load data, tweak, masked, at
    vmovdqu64 \data, [rsi + \at]
    vpternlogq \data, \tweak, zmm24, 0x96
    vpxorq \masked, \tweak, zmm25
    .endm

    .macro vmseal512_store last, data, masked, at, store
    \last \data, \data, \masked
    \store [rdx + \at], \data
    .endm

# What is soon read: of far memory nothing is kept in the caches, and what lies behind the source comes too, as requests of
# that size are often followed by their neighbours.
    .macro vmseal512_prefetch store, at
    .ifc \store, vmovntdq
    prefetchnta [rbx + \at]
    .else
    prefetcht0 [rbx + \at]
    .endif
    .endm

# Half a kilobyte, with `tweaks` being either of the two above.
    .macro vmseal512_half_kilobyte op, last, store, tweaks
    lea rbx, [rsi + 8192]
    .ifnc \store, vmovntdq
    cmp rbx, r11
    cmova rbx, r11
    .endif
    vmovdqa64 zmm24, [rdi]
    vmovdqa64 zmm25, [rdi + 64*14]
    vmseal512_load zmm0, zmm8, zmm16, 0
    vmseal512_load zmm1, zmm9, zmm17, 64
    vmseal512_load zmm2, zmm10, zmm18, 128
    vmseal512_load zmm3, zmm11, zmm19, 192
    vmseal512_load zmm4, zmm12, zmm20, 256
    vmseal512_load zmm5, zmm13, zmm21, 320
    vmseal512_load zmm6, zmm14, zmm22, 384
    vmseal512_load zmm7, zmm15, zmm23, 448
    .irp round, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13
    vmovdqa64 zmm24, [rdi + 64*\round]
    .irp data, zmm0, zmm1, zmm2, zmm3, zmm4, zmm5, zmm6, zmm7
    \op \data, \data, zmm24
    .endr
    \tweaks \round
    .if \round <= 8
    vmseal512_prefetch \store, 64*(\round - 1)
    .endif
    .endr
    vmseal512_store \last, zmm0, zmm16, 0, \store
    vmseal512_store \last, zmm1, zmm17, 64, \store
    vmseal512_store \last, zmm2, zmm18, 128, \store
    vmseal512_store \last, zmm3, zmm19, 192, \store
    vmseal512_store \last, zmm4, zmm20, 256, \store
    vmseal512_store \last, zmm5, zmm21, 320, \store
    vmseal512_store \last, zmm6, zmm22, 384, \store
    vmseal512_store \last, zmm7, zmm23, 448, \store
    add rsi, 512
    add rdx, 512
    .endm

# Encrypts the next four numbers, long before they are needed: one dependent round after another, between all else.
    .macro vmseal512_encrypt_numbers
    vpxorq zmm28, zmm31, [r8]
    .irp round, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13
    vaesenc zmm28, zmm28, [r8 + 64*\round]
    .endr
    vaesenclast zmm28, zmm28, [r8 + 64*14]
    vpbroadcastq zmm25, r9
    vpmuludq zmm25, zmm25, [rip + .Lvmseal512_fours]
    vpaddq zmm31, zmm31, zmm25
    .endm

# rcx is a Job: number of the first unit (16 bytes), units, half kilobytes of a unit; neither is 0.
    .macro vmseal512_units op, last, store
    push rbx
    mov r9, [rcx + 24]
    vpbroadcastq zmm31, r9
    vpmuludq zmm31, zmm31, [rip + .Lvmseal512_lanes]
    vbroadcasti32x4 zmm25, [rcx]
    vpaddq zmm31, zmm31, zmm25
    mov rcx, [rcx + 16]
    mov r11, rcx
    imul r11, r9
    shl r11, 9
    lea r11, [r11 + rsi - 512]
    vmovdqa64 zmm29, [rip + .Lvmseal512_left]
    vmovdqa64 zmm30, [rip + .Lvmseal512_right]
    vbroadcasti32x4 zmm26, [rip + .Lvmseal512_polynomial]
    vmseal512_encrypt_numbers
    vmovdqa64 zmm27, zmm28
    .irp round, 1, 2, 3, 5, 6, 7, 8, 9, 10
    vmseal512_begin \round
    .endr
    vmseal512_encrypt_numbers
    mov eax, 3
2:
    mov r10, r9
    dec r10
    jz 4f
    .p2align 5
3:
    vmseal512_half_kilobyte \op, \last, \store, vmseal512_step
    dec r10
    jnz 3b
4:
    vmseal512_half_kilobyte \op, \last, \store, vmseal512_begin
    dec eax
    jnz 5f
    mov eax, 4
    vmovdqa64 zmm27, zmm28
    vmseal512_encrypt_numbers
5:
    dec rcx
    jnz 2b
    .ifc \store, vmovntdq
    sfence
    .endif
    .irp n, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31
    vpxord zmm\n, zmm\n, zmm\n
    .endr
    vzeroall
    pop rbx
    ret
    .endm

    .endif
