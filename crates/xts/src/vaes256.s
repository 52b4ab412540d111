# AES-256-XTS, 128 bytes at a time: eight blocks in four registers of 32 bytes. What it computes is said in vaes512.rs.
#
# Nothing but sector numbers and addresses is ever on the stack: round keys come from the schedule in secret memory, one
# register at a time, and tweaks never leave the registers, all of which are zero at the end.
#
#   rdi  round keys of the data key, 64 bytes each      ymm0-3    data
#   rsi  source                                         ymm4-7    tweaks of the next 128 bytes, once these began
#   rdx  destination                                    ymm8-11   tweaks of these, with the last round key
#   rcx  units left                                     ymm12     a round key, or scratch between two rounds
#   r8   round keys of the tweak key                    ymm13     scratch
#   r9   times 128 bytes of a unit                      ymm14     encrypted numbers of the two units after those in ymm15
#   r10  of them left of this unit                      ymm15     encrypted numbers of this and the next unit, rotating
#   r11  last 128 bytes of the source
#   rax  half kilobytes of a unit, by which numbers go up
#   rbx  what to prefetch
#   rbp  encrypted numbers left in ymm15
#   r12, r13  number of the first unit after those in ymm14
    .ifndef VMSEAL_VAES256
    .set VMSEAL_VAES256, 1

    .pushsection .rodata.vmseal_vaes256, "a", @progbits
    .p2align 5
.Lvmseal256_left:
    .quad 0, 0, 1, 1
.Lvmseal256_right:
    .quad 64, 64, 63, 63
.Lvmseal256_polynomial:
    .quad 0x87, 0, 0x87, 0
    .popsection

    .macro vmseal256_times_byte tweak
    vpsrlq ymm13, \tweak, 56
    vpclmulqdq ymm13, ymm13, [rip + .Lvmseal256_polynomial], 0x01
    vpslldq \tweak, \tweak, 1
    vpxor \tweak, \tweak, ymm13
    .endm

# to = from * x^bits; rest is 64 - bits.
    .macro vmseal256_times_bits to, from, bits, rest
    vpsrlq ymm13, \from, \rest
    vpsllq \to, \from, \bits
    vpclmulqdq ymm12, ymm13, [rip + .Lvmseal256_polynomial], 0x01
    vpslldq ymm13, ymm13, 8
    vpxor \to, \to, ymm12
    vpxor \to, \to, ymm13
    .endm

# What to do between two rounds when the next 128 bytes belong to the same unit: all tweaks times x^8.
    .macro vmseal256_step round
    .if \round == 1
    vmseal256_times_byte ymm4
    .elseif \round == 3
    vmseal256_times_byte ymm5
    .elseif \round == 5
    vmseal256_times_byte ymm6
    .elseif \round == 7
    vmseal256_times_byte ymm7
    .endif
    .endm

# The same when they begin a unit: T in both lanes, times x^0 and x^1, then by x^2 and x^4.
    .macro vmseal256_begin round
    .if \round == 1
    vperm2i128 ymm4, ymm15, ymm15, 0x00
    vperm2i128 ymm15, ymm15, ymm15, 0x01
    vpsrlvq ymm13, ymm4, [rip + .Lvmseal256_right]
    vpsllvq ymm4, ymm4, [rip + .Lvmseal256_left]
    vpclmulqdq ymm12, ymm13, [rip + .Lvmseal256_polynomial], 0x01
    vpslldq ymm13, ymm13, 8
    vpxor ymm4, ymm4, ymm12
    vpxor ymm4, ymm4, ymm13
    .elseif \round == 3
    vmseal256_times_bits ymm5, ymm4, 2, 62
    .elseif \round == 4
    vmseal256_times_bits ymm6, ymm4, 4, 60
    .elseif \round == 6
    vmseal256_times_bits ymm7, ymm5, 4, 60
    .endif
    .endm

    .macro vmseal256_load data, tweak, masked, at
    vpxor \data, ymm12, [rsi + \at]
    vpxor \data, \data, \tweak
    vpxor \masked, \tweak, ymm13
    .endm

    .macro vmseal256_store last, data, masked, at, store
    \last \data, \data, \masked
    \store [rdx + \at], \data
    .endm

# What is soon read: of far memory nothing is kept in the caches, and what lies behind the source comes too, as requests of
# that size are often followed by their neighbours.
    .macro vmseal256_prefetch store, at
    .ifc \store, vmovntdq
    prefetchnta [rbx + \at]
    .else
    prefetcht0 [rbx + \at]
    .endif
    .endm

# 128 bytes, with `tweaks` being either of the two above.
    .macro vmseal256_eight_blocks op, last, store, tweaks
    lea rbx, [rsi + 8192]
    .ifnc \store, vmovntdq
    cmp rbx, r11
    cmova rbx, r11
    .endif
    vmovdqa ymm12, [rdi]
    vmovdqa ymm13, [rdi + 64*14]
    vmseal256_load ymm0, ymm4, ymm8, 0
    vmseal256_load ymm1, ymm5, ymm9, 32
    vmseal256_load ymm2, ymm6, ymm10, 64
    vmseal256_load ymm3, ymm7, ymm11, 96
    vmseal256_prefetch \store, 0
    vmseal256_prefetch \store, 64
    .irp round, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13
    vmovdqa ymm12, [rdi + 64*\round]
    .irp data, ymm0, ymm1, ymm2, ymm3
    \op \data, \data, ymm12
    .endr
    \tweaks \round
    .endr
    vmseal256_store \last, ymm0, ymm8, 0, \store
    vmseal256_store \last, ymm1, ymm9, 32, \store
    vmseal256_store \last, ymm2, ymm10, 64, \store
    vmseal256_store \last, ymm3, ymm11, 96, \store
    sub rsi, -128
    sub rdx, -128
    .endm

# Encrypts the next two numbers, long before they are needed: one dependent round after another, between all else.
    .macro vmseal256_encrypt_numbers
    vmovq xmm14, r12
    vpinsrq xmm14, xmm14, r13, 1
    add r12, rax
    vmovq xmm13, r12
    vpinsrq xmm13, xmm13, r13, 1
    add r12, rax
    vinserti128 ymm14, ymm14, xmm13, 1
    vpxor ymm14, ymm14, [r8]
    .irp round, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13
    vaesenc ymm14, ymm14, [r8 + 64*\round]
    .endr
    vaesenclast ymm14, ymm14, [r8 + 64*14]
    .endm

# rcx is a Job: number of the first unit (16 bytes), units, half kilobytes of a unit; neither is 0.
    .macro vmseal256_units op, last, store
    push rbx
    push rbp
    push r12
    push r13
    mov rax, [rcx + 24]
    mov r12, [rcx]
    mov r13, [rcx + 8]
    mov rcx, [rcx + 16]
    lea r9, [4*rax]
    mov r11, rcx
    imul r11, r9
    shl r11, 7
    lea r11, [r11 + rsi - 128]
    vmseal256_encrypt_numbers
    vmovdqa ymm15, ymm14
    .irp round, 1, 3, 4, 6
    vmseal256_begin \round
    .endr
    vmseal256_encrypt_numbers
    mov ebp, 1
2:
    mov r10, r9
    dec r10
    .p2align 5
3:
    vmseal256_eight_blocks \op, \last, \store, vmseal256_step
    dec r10
    jnz 3b
    vmseal256_eight_blocks \op, \last, \store, vmseal256_begin
    dec ebp
    jnz 4f
    mov ebp, 2
    vmovdqa ymm15, ymm14
    vmseal256_encrypt_numbers
4:
    dec rcx
    jnz 2b
    .ifc \store, vmovntdq
    sfence
    .endif
    vzeroall
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
    .endm

    .endif
