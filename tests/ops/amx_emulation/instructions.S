// Tile instructions as the assembler encodes them, for tests/ops/test_amx.py: functions of (const void* config,
// const void* from, void* to), rows of memory 64 bytes apart.

    .bss
    .balign 8
from:   .zero 8
to:     .zero 8
stack:  .zero 8

    .section .rodata
    .balign 64
three_tiles:  // 5 x 28, 7 x 36 and 16 x 64 bytes
    .byte 1, 0
    .zero 14
    .short 28, 36, 64
    .zero 26
    .byte 5, 7, 16
    .zero 13

    .text

// What the last load brought is stored at `to`, which moves on.
.macro keep
    mov stack(%rip), %rsp
    mov to(%rip), %rax
    mov $64, %ecx
    tilestored %tmm1, (%rax,%rcx,1)
    tilezero %tmm1
    addq $1024, to(%rip)
.endm

// The tile at `from`, by any address. (Below the stack's red zone a signal's frame may lie: with %rsp it is not `from`.)
.macro load_by base, index, scale=1, displacement=0
    mov from(%rip), %\base
    sub $(\displacement), %\base
    mov $(64 / \scale), %\index
    tileloadd \displacement(%\base,%\index,\scale), %tmm1
    keep
.endm

// The tile by every register as base and as index, by every scale and displacement; then its first row sixteen times, as
// there is no index; then its rows from the last to the first. Returns how many were loaded by load_by.
    .globl moves
moves:
    push %rbx
    push %rbp
    push %r12
    push %r13
    push %r14
    push %r15
    push %rdx
    mov %rsp, stack(%rip)
    mov %rsi, from(%rip)
    mov %rdx, to(%rip)
    ldtilecfg (%rdi)
    .irp register, rax, rbx, rdx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15
    load_by \register, rcx
    .endr
    load_by rcx, rdx
    .irp register, rax, rbx, rcx, rdx, rbp, rdi, r8, r9, r10, r11, r12, r13, r14, r15
    load_by rsi, \register, 2
    .endr
    load_by rdi, rsi, 2
    .irp displacement, 0, 1, 127, -128, 128, 100000, -100000
    load_by r12, r13, 4, \displacement
    load_by r13, r12, 8, \displacement
    load_by rbp, rbx, 1, \displacement
    load_by rsp, rbp, 1, \displacement
    .endr
    mov to(%rip), %rbx
    mov from(%rip), %rsi
    tileloadd (%rsi), %tmm1
    keep
    mov from(%rip), %rsi
    mov $-64, %rcx
    tileloadd 960(%rsi,%rcx,1), %tmm1
    keep
    tilerelease
    mov %rbx, %rax
    pop %rdx
    sub %rdx, %rax
    shr $10, %rax
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbp
    pop %rbx
    ret

// to: the configuration before there is one, then three_tiles as it is loaded by an address relative to the code.
    .globl configurations
configurations:
    tilerelease
    sttilecfg (%rdx)
    ldtilecfg three_tiles(%rip)
    sttilecfg 64(%rdx)
    tilerelease
    ret

// to: tile 3 at `from` plus the product of tile 5, 1,024 bytes on, with tile 6, 2,048 on.
.macro product instruction
    .globl product_\instruction
product_\instruction:
    ldtilecfg (%rdi)
    mov $64, %ecx
    tileloadd (%rsi,%rcx,1), %tmm3
    tileloaddt1 1024(%rsi,%rcx,1), %tmm5
    tileloadd 2048(%rsi,%rcx,1), %tmm6
    \instruction %tmm6, %tmm5, %tmm3
    tilestored %tmm3, (%rdx,%rcx,1)
    tilerelease
    ret
.endm
    .irp instruction, tdpbssd, tdpbsud, tdpbusd, tdpbuud, tdpbf16ps
    product \instruction
    .endr

// product_tdpbf16ps where MXCSR asks to round up; returns it as it is then.
    .globl product_rounding_up
product_rounding_up:
    sub $8, %rsp
    stmxcsr 4(%rsp)
    movl $0x5f80, (%rsp)
    ldmxcsr (%rsp)
    call product_tdpbf16ps
    stmxcsr (%rsp)
    mov (%rsp), %eax
    ldmxcsr 4(%rsp)
    add $8, %rsp
    ret

// to: the 64 bytes at `from`, which vector registers, mask registers, the stack's red zone and the flags held during tile
// instructions.
    .globl interrupted
interrupted:
    vmovdqu8 (%rsi), %zmm0
    vmovdqu8 (%rsi), %zmm31
    kmovq (%rsi), %k7
    vmovdqu8 %zmm0, -64(%rsp)
    vmovdqu8 %zmm0, -128(%rsp)
    stc
    ldtilecfg (%rdi)
    tilezero %tmm1
    tilerelease
    setc 256(%rdx)
    vmovdqu8 %zmm0, (%rdx)
    vmovdqu8 %zmm31, 64(%rdx)
    vmovdqu8 -64(%rsp), %zmm0
    vmovdqu8 %zmm0, 128(%rdx)
    vmovdqu8 -128(%rsp), %zmm0
    vmovdqu8 %zmm0, 192(%rdx)
    kmovq %k7, 264(%rdx)
    vzeroupper
    ret

    .section .note.GNU-stack, "", @progbits
