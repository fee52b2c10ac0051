# The purgatory: what runs between the death of K1 and the first instruction of K2.
#
# It executes a table of moves, whole 128-byte cache lines at a time, and enters K2. Nothing else: what the moves are and
# why is decided at load time (crashkernel.placement); the bytes around this code are packed by crashkernel.purgatory.
# docs/purgatory.md is the contract with both kernels. Rebuild with `make purgatory`; a test compares the shipped bytes.
#
# How K1 gets here (Linux arch/powerpc/kernel/misc_64.S, kexec_sequence and kexec_wait):
#   - it copies our first 0x100 bytes to physical 0, over its own;
#   - the CPU that crashed jumps to our first byte: real mode, interrupts off, r3 = its physical id, in K1's endianness;
#   - every other CPU goes to absolute 0x60, into that copy: real mode, r3 = its physical id.
#
# One big-endian image serves both endiannesses: each entry begins with words that mean "switch" to a little-endian CPU
# and "go on" to a big-endian one. K2 does the same at its own entry (FIXUP_ENDIAN), so K2 is always entered big-endian.
#
# Only instructions of the PowerPC 970 and later; position-independent; no stack; real mode throughout.

        .machine "power4"
        .text
        .globl  _start

# ---------------------------------------------------------------------------------------------- parameter block
# Offsets from `params`; crashkernel.purgatory declares the same block in Python.
        .set    P_MAGIC,          0x00  # "CRASHPRG"
        .set    P_FDT,            0x08  # K2's flattened device tree
        .set    P_ENTRY,          0x10  # K2's first instruction
        .set    P_OPAL_BASE,      0x18  # bare metal only, else 0
        .set    P_OPAL_ENTRY,     0x20
        .set    P_SLAVE_TIMEOUT,  0x28  # timebase ticks to wait for K1's other CPUs
        .set    P_SLAVES_EXPECTED,0x30  # how many of them K1 had when the plan was made               (32 bits)
        .set    P_SLAVES_ARRIVED, 0x34  # counted here, by themselves                                  (32 bits)
        .set    P_RELEASED,       0x38  # 1: K2's head is at address 0, go to its 0x60                  (32 bits)
        .set    P_MOVE_COUNT,     0x3c  #                                                               (32 bits)
        .set    P_PARTITION,      0x40  # 1: below us is a PAPR hypervisor, make hypercalls            (32 bits)
        .set    P_MOVES,          0x80  # 32 x { operation, dst, src, size }, 64 bits each
        .set    P_HEAD,           0x480 # K1's first 0x100 bytes, saved at load time
        .set    P_SIZE,           0x580

        .set    MOVE_OPERATION,   0x00
        .set    MOVE_DST,         0x08
        .set    MOVE_SRC,         0x10
        .set    MOVE_SIZE,        0x18
        .set    MOVE_BYTES,       0x20

        .set    OPERATION_COPY,     1
        .set    OPERATION_EXCHANGE, 2

        .set    H_REGISTER_VPA,   0xdc  # PAPR 14.11.3.2; functions in bits 16-18 of the flags
        .set    VPA_DEREGISTER,       5
        .set    DTL_DEREGISTER,       6
        .set    SLB_SHADOW_DEREGISTER,7

        .set    LINE,             0x80  # cache block size of every 64-bit POWER server CPU since the 970
        .set    LINE_SHIFT,       7
        .set    FDT_BOOT_CPUID,   28    # offset of boot_cpuid_phys in the tree's header (Devicetree spec 5.2)

# ---------------------------------------------------------------------------------------------- endianness
# An instruction as a little-endian CPU fetches it from this big-endian image.
        .macro  le insn
        .long   (((\insn) & 0xff) << 24) | (((\insn) & 0xff00) << 8) | (((\insn) >> 8) & 0xff00) | (((\insn) >> 24) & 0xff)
        .endm

# Leaves the CPU big-endian whatever it was. Clobbers r10, r11, lr, srr0, srr1. 0x30 bytes.
        .macro  be_from_here
        tdi     0,%r0,0x48              # big-endian: never traps.   little-endian: reads as `b .+8`
        b       .+0x2c                  # big-endian: all is well.   little-endian: jumped over
        le      0x7d6000a6              # mfmsr  r11
        le      0x696b0001              # xori   r11,r11,1           MSR.LE off
        le      0x39400000              # li     r10,0
        le      0x7d410164              # mtmsrd r10,1               MSR.RI off: srr0/srr1 are about to be ours
        le      0x429f0005              # bcl    20,31,.+4
        le      0x7d4802a6              # mflr   r10
        le      0x394a0014              # addi   r10,r10,20          the first instruction after the macro
        le      0x7d5a03a6              # mtsrr0 r10
        le      0x7d7b03a6              # mtsrr1 r11
        le      0x4c000024              # rfid
        .endm

# ---------------------------------------------------------------------------------------------- half a line
# 64 bytes at r27 to eight registers, and from them to r26.
        .macro  load_half
        ld      %r7,0(%r27)
        ld      %r8,8(%r27)
        ld      %r9,16(%r27)
        ld      %r10,24(%r27)
        ld      %r11,32(%r27)
        ld      %r12,40(%r27)
        ld      %r14,48(%r27)
        ld      %r15,56(%r27)
        .endm

        .macro  store_half
        std     %r7,0(%r26)
        std     %r8,8(%r26)
        std     %r9,16(%r26)
        std     %r10,24(%r26)
        std     %r11,32(%r26)
        std     %r12,40(%r26)
        std     %r14,48(%r26)
        std     %r15,56(%r26)
        .endm

# ---------------------------------------------------------------------------------------------- the head
# These 0x100 bytes run where they were loaded (the crashing CPU) and, copied by K1, at physical 0 (all others).
_start:
        be_from_here
        b       master

        . = _start + 0x58
loaded_at:
        .quad   0                       # where this image was loaded: the copy at physical 0 must find its way back

        . = _start + 0x60
# K1's other CPUs. Page 0 is about to be moved under their feet, so they leave it at once for the reserved region.
        be_from_here
        bcl     20,31,1f
1:      mflr    %r10
        ld      %r10,(loaded_at - 1b)(%r10)
        addi    %r10,%r10,(slave - _start)
        mtctr   %r10
        bctr

        . = _start + 0x100
# ---------------------------------------------------------------------------------------------- the other CPUs
slave:
        bcl     20,31,1f
1:      mflr    %r30
        addi    %r30,%r30,(params - 1b)
        mr      %r31,%r3                # physical id
        bl      leave_hypervisor_areas
        addi    %r10,%r30,P_SLAVES_ARRIVED
2:      lwarx   %r9,0,%r10
        addi    %r9,%r9,1
        stwcx.  %r9,0,%r10
        bne-    2b
3:      or      %r1,%r1,%r1             # low thread priority: leave the core to the one that works
        lwz     %r9,P_RELEASED(%r30)
        cmpwi   %r9,0
        beq     3b
        or      %r2,%r2,%r2             # medium priority again
        isync                           # nothing of K2's head was fetched before we saw the release
        mr      %r3,%r31
        li      %r10,0x60               # K2's __secondary_hold (arch/powerpc/kernel/head_64.S)
        mtctr   %r10
        bctr

# ---------------------------------------------------------------------------------------------- the hypervisor
# A hypervisor counts a CPU's dispatches in that CPU's VPA, a page of K1's that K1 registered and, dying, leaves registered
# (pseries_kexec_cpu_down, arch/powerpc/platforms/pseries/kexec.c: up to 6.1.176 no hypervisor call in a crash; 6.1.192 and
# 7.2 take it back themselves). Where memory moves, these writes would go on into what lies there now, K2. So each CPU takes
# its own areas back; the VPA goes last, the hypervisor keeps it while the others stand. r30 = params, r31 = physical id.
# Clobbers what a hypercall may: r0, r3-r12, ctr, xer, cr.
leave_hypervisor_areas:
        lwz     %r9,P_PARTITION(%r30)
        cmpwi   %r9,0
        beqlr
        li      %r29,SLB_SHADOW_DEREGISTER
1:      li      %r3,H_REGISTER_VPA
        sldi    %r4,%r29,63-18
        mr      %r5,%r31
        li      %r6,0
        .long   0x44000022              # sc 1; an area that was never registered is refused, which is as good
        addi    %r29,%r29,-1
        cmpwi   %r29,VPA_DEREGISTER
        bge     1b
        blr

# ---------------------------------------------------------------------------------------------- the crashing CPU
master:
        mr      %r31,%r3                # physical id
        bcl     20,31,1f
1:      mflr    %r30
        addi    %r30,%r30,(params - 1b)

        bl      leave_hypervisor_areas

# Moving K1's text under a CPU that still executes it (kexec_wait) sends that CPU anywhere. Wait until all have left,
# but not for ever: one that is stuck never comes.
        lwz     %r10,P_SLAVES_EXPECTED(%r30)
        ld      %r11,P_SLAVE_TIMEOUT(%r30)
        mftb    %r12
2:      lwz     %r9,P_SLAVES_ARRIVED(%r30)
        cmplw   %r9,%r10
        bge     3f
        mftb    %r8
        subf    %r8,%r12,%r8
        cmpld   %r8,%r11
        blt     2b
3:      isync

# One move after the other. r29 = moves left, r28 = this move.
        lwz     %r29,P_MOVE_COUNT(%r30)
        addi    %r28,%r30,P_MOVES
next_move:
        cmpwi   %r29,0
        beq     enter
        ld      %r3,MOVE_OPERATION(%r28)
        ld      %r4,MOVE_DST(%r28)
        ld      %r5,MOVE_SRC(%r28)
        ld      %r6,MOVE_SIZE(%r28)
        srdi.   %r6,%r6,LINE_SHIFT      # lines; a move of none is no move
        beq     move_done
        mtctr   %r6
        cmpdi   %r3,OPERATION_EXCHANGE
        beq     exchange
        cmpdi   %r3,OPERATION_COPY
        beq     copy
unknown_operation:
        b       unknown_operation       # to guess would lose K1's memory: stop, and let the host look

copy:
        mr      %r26,%r4
        mr      %r27,%r5
copy_line:
        li      %r25,2                  # two halves of a line
1:      load_half
        store_half
        addi    %r26,%r26,64
        addi    %r27,%r27,64
        addic.  %r25,%r25,-1
        bne     1b
        bdnz    copy_line
        b       coherent

exchange:
        mr      %r26,%r4
        mr      %r27,%r5
exchange_line:
        li      %r25,2
1:      load_half
        ld      %r16,0(%r26)
        ld      %r17,8(%r26)
        ld      %r18,16(%r26)
        ld      %r19,24(%r26)
        ld      %r20,32(%r26)
        ld      %r21,40(%r26)
        ld      %r22,48(%r26)
        ld      %r23,56(%r26)
        store_half
        std     %r16,0(%r27)
        std     %r17,8(%r27)
        std     %r18,16(%r27)
        std     %r19,24(%r27)
        std     %r20,32(%r27)
        std     %r21,40(%r27)
        std     %r22,48(%r27)
        std     %r23,56(%r27)
        addi    %r26,%r26,64
        addi    %r27,%r27,64
        addic.  %r25,%r25,-1
        bne     1b
        bdnz    exchange_line

# What was moved may be executed: push the destination out of the data cache, then drop stale instructions
# (Power ISA Book II 1.8.1). r4 = dst, r6 = lines.
coherent:
        mtctr   %r6
        mr      %r7,%r4
1:      dcbst   0,%r7
        addi    %r7,%r7,LINE
        bdnz    1b
        sync
        mtctr   %r6
        mr      %r7,%r4
2:      icbi    0,%r7
        addi    %r7,%r7,LINE
        bdnz    2b
        sync
        isync

move_done:
        addi    %r28,%r28,MOVE_BYTES
        addi    %r29,%r29,-1
        b       next_move

# K2's head is at physical 0 now: the others may go to its 0x60, and we to its first byte.
enter:
        ld      %r3,P_FDT(%r30)
        stw     %r31,FDT_BOOT_CPUID(%r3)
        li      %r9,1
        sync
        stw     %r9,P_RELEASED(%r30)
        ld      %r4,P_ENTRY(%r30)
        ld      %r8,P_OPAL_BASE(%r30)
        ld      %r9,P_OPAL_ENTRY(%r30)
        li      %r5,0                   # not Open Firmware
        li      %r6,0
        li      %r7,0
        mtctr   %r4
        sync
        isync
        bctr

# ---------------------------------------------------------------------------------------------- parameters
        . = _start + 0x800
params:
        .ascii  "CRASHPRG"
        . = params + P_SIZE
