# The purgatory: what runs between the death of K1 and the first instruction of K2.
#
# It executes a table of rows: moves of whole 128-byte cache lines, checks of what was loaded, and the entry of K2. What the rows
# are and why is decided at load time (crashkernel.placement); the bytes around this code are packed by crashkernel.purgatory,
# the text of every line it says included. docs/purgatory.md is the contract with both kernels. Rebuild with `make purgatory`;
# a test compares the shipped bytes.
#
# How K1 gets here (Linux arch/powerpc/kernel/misc_64.S, kexec_sequence and kexec_wait):
#   - it copies our first 0x100 bytes to physical 0, over its own;
#   - the CPU that crashed jumps to our first byte: real mode, interrupts off, r3 = its physical id, in K1's endianness;
#   - every other CPU goes to absolute 0x60, into that copy: real mode, r3 = its physical id.
#
# One big-endian image serves both endiannesses: each entry begins with words that mean "switch" to a little-endian CPU
# and "go on" to a big-endian one. K2 does the same at its own entry (FIXUP_ENDIAN), so K2 is always entered big-endian.
#
# Only instructions of the PowerPC 970 and later; position-independent; no stack; real mode throughout. AltiVec is used where the
# machine's tree says that the CPU has it.
#
# Registers with one meaning from end to end: r28 this row, r29 rows left, r30 params, r31 this CPU's physical id.

        .machine "power4"
        .machine "altivec"
        .text
        .globl  _start

# ---------------------------------------------------------------------------------------------- the image
# Offsets from `_start`; crashkernel.purgatory declares the same in Python.
        .set    AT_SLAVE,         0x60
        .set    AT_VECTORS,       0x100
        .set    AT_NARROW,        0xe00         # from here on a vector each 0x20 bytes
        .set    AT_TAIL,          0xfa0         # what those have in common
        .set    AT_HANDLER,       0xff8         # where the vectors' common handler lies, in the copy at physical 0 too
        .set    AT_CODE,          0x1000
        .set    AT_PARAMS,        0x2000
        .set    AT_TABLE,         0x3000        # 32 rows
        .set    AT_CRC,           0x5000        # four tables of 256 words
        .set    AT_STATE,         0x6000        # what is written at run time, and so under no digest; ends the image
        .set    AT_SAVED,         0x7000        # a page for K2's low page, by the table (crashkernel.placement.tables)
        .set    AT_LOG,           0x8000        # all that was said, NUL-terminated
        .set    LOG_SIZE,         0x2000

# Offsets from `params`.
        .set    P_MAGIC,          0x00  # "CRASHPRG"
        .set    P_SLAVE_TIMEOUT,  0x08  # timebase ticks to wait for K1's other CPUs
        .set    P_SLAVES_EXPECTED,0x10  # how many of them K1 had when the plan was made
        .set    P_ROWS,           0x18  # rows of the table in use
        .set    P_ON_DAMAGE,      0x20  # below
        .set    P_ALTIVEC,        0x28  # 1: the CPU has it
        .set    P_FIRMWARE,       0x30  # below
        .set    P_CONSOLE,        0x38  # the console's number in the firmware's words; all ones: none
        .set    P_OPAL_BASE,      0x40  # bare metal only, else 0
        .set    P_OPAL_ENTRY,     0x48
        .set    P_RTAS_BASE,      0x50  # partitions only, else 0
        .set    P_RTAS_ENTRY,     0x58
        .set    P_RTAS_REBOOT,    0x60  # token of system-reboot
        .set    P_RTAS_NMI,       0x68  # token of ibm,nmi-register; 0: none
        .set    P_CONSOLE_TIMEOUT,0x70  # timebase ticks that a text may wait for a console that is busy
        .set    P_HEAD,           0x100 # K1's first 0x100 bytes, saved at load time
        .set    P_END,            0x200
        .set    P_TABLE,          AT_TABLE - AT_PARAMS
        .set    P_CRC,            AT_CRC - AT_PARAMS
        .set    P_LOG,            AT_LOG - AT_PARAMS

        .set    P_STATE,          AT_STATE - AT_PARAMS
        .set    P_IMAGE_DIGEST,   P_STATE + 0x00        # of all of the image before AT_STATE
        .set    P_CODE_DIGEST,    P_STATE + 0x40        # of code and parameters, AT_CODE to P_END
        .set    P_ARRIVED,        P_STATE + 0x80        # CPUs that came: the same count in both halves
        .set    P_RELEASED,       P_STATE + 0x88        # P_MAGIC: K2's head is at address 0, go to its 0x60
        .set    P_LOG_END,        P_STATE + 0x90
        .set    P_FAULTED,        P_STATE + 0x98        # not 0: a CPU that waits has taken an exception, noted below
        .set    P_LENGTH,         P_STATE + 0xa0        # for OPAL, which takes the address of a length
        .set    P_RTAS_ARGS,      P_STATE + 0xa8        # token, nargs, nret, args, rets: 32 bits each
        .set    P_FAULT_VECTOR,   P_STATE + 0xc0        # of a CPU that waits
        .set    P_FAULT_SRR0,     P_STATE + 0xc8
        .set    P_DIGITS,         P_STATE + 0xd0        # a number as text
        .set    P_FAULT_SRR1,     P_STATE + 0xe8
        .set    P_FAULT_CLAIM,    P_STATE + 0xf0        # not 0: one is being noted
        .set    P_FAULTED_HERE,   P_STATE + 0xf8        # not 0: the crashing CPU has told one of its own
        .set    STATE_SIZE,       0x100

        .set    HALT,               0   # P_ON_DAMAGE; whatever is neither of the others
        .set    REBOOT,             1
        .set    GO_ON,              2

        .set    PAPR,               1   # P_FIRMWARE
        .set    OPAL,               2

        .set    ROW_OPERATION,    0x00
        .set    ROW_DST,          0x08
        .set    ROW_SRC,          0x10
        .set    ROW_SIZE,         0x18
        .set    ROW_DIGEST,       0x20  # of a check
        .set    ROW_TEXT,         0x60  # what to say before it, NUL-terminated
        .set    ROW_OWN_DIGEST,   0xc0  # of all of the row before this
        .set    ROW_BYTES,        0x100

        .set    OPERATION_COPY,     1
        .set    OPERATION_EXCHANGE, 2
        .set    OPERATION_CHECK,    3   # of ROW_SIZE bytes at ROW_DST
        .set    OPERATION_ENTER,    4   # K2 at ROW_DST, its device tree at ROW_SRC

        .set    H_PUT_TERM_CHAR,  0x58  # PAPR 14.15.1
        .set    H_BUSY,              1
        .set    H_LONG_BUSY,      9900  # and five more
        .set    H_REGISTER_VPA,   0xdc  # PAPR 14.11.3.2; functions in bits 16-18 of the flags
        .set    VPA_DEREGISTER,       5
        .set    DTL_DEREGISTER,       6
        .set    SLB_SHADOW_DEREGISTER,7
        .set    OPAL_CONSOLE_WRITE,   1 # skiboot doc/opal-api
        .set    OPAL_CEC_REBOOT,      6
        .set    OPAL_POLL_EVENTS,    10
        .set    OPAL_BUSY,           -2
        .set    OPAL_BUSY_EVENT,    -12

        .set    MSR_VEC,          0x0200        # upper half of the low word
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

# ---------------------------------------------------------------------------------------------- the head
# These 0x100 bytes run where they were loaded (the crashing CPU) and, copied by K1, at physical 0 (all others).
_start:
        be_from_here
        b       master

        . = _start + 0x48
loaded_at:
        .quad   0, 0, 0                 # where this image was loaded: the copy at physical 0 must find its way back

        . = _start + AT_SLAVE
# K1's other CPUs. They leave page 0 at once for the reserved region. Nothing has checked these bytes yet: of three copies of
# the address, two outvote a flipped bit in the third.
        be_from_here
        bcl     20,31,1f
1:      mflr    %r10
        ld      %r7,(loaded_at - 1b)(%r10)
        ld      %r8,(loaded_at - 1b + 8)(%r10)
        ld      %r9,(loaded_at - 1b + 16)(%r10)
        and     %r10,%r7,%r8
        and     %r7,%r7,%r9
        and     %r8,%r8,%r9
        or      %r10,%r10,%r7
        or      %r10,%r10,%r8
        addi    %r10,%r10,(slave - _start)
        mtctr   %r10
        bctr

# ---------------------------------------------------------------------------------------------- the vectors
# While things move, the table keeps this image's first page at physical 0: whatever is taken there (a machine check, a system
# reset, a fault of ours) is told and ends the handover. Interrupts come in the endianness that K1 chose (LPCR.ILE, HILE).
        .set    vector, AT_VECTORS
        .rept   (AT_NARROW - AT_VECTORS) / 0x80
        . = _start + vector
        tdi     0,%r0,0x48              # as in be_from_here
        b       .+0x34
        le      0x7e9a02a6              # mfsrr0 r20
        le      0x7ebb02a6              # mfsrr1 r21
        le      0x7d6000a6              # mfmsr  r11
        le      0x696b0001              # xori   r11,r11,1
        le      0x39400000              # li     r10,0
        le      0x7d410164              # mtmsrd r10,1
        le      0x429f0005              # bcl    20,31,.+4
        le      0x7d4802a6              # mflr   r10
        le      0x394a001c              # addi   r10,r10,28          over the next two, which were done
        le      0x7d5a03a6              # mtsrr0 r10
        le      0x7d7b03a6              # mtsrr1 r11
        le      0x4c000024              # rfid
        mfsrr0  %r20
        mfsrr1  %r21
        li      %r3,vector
        ld      %r10,AT_HANDLER(0)
        mtctr   %r10
        bctr
        .set    vector, vector + 0x80
        .endr

# The hypervisor's and the facilities' (Power ISA Book III 7.5) are 0x20 apart. An instruction that is none comes to 0xe40 in a
# machine without a hypervisor, from the POWER8 on, and not to 0x700.
        .rept   (AT_TAIL - AT_NARROW) / 0x20
        . = _start + vector
        tdi     0,%r0,0x48
        b       .+0xc
        le      (0x38600000 | vector)                   # li r3,vector
        le      (0x48000000 | (AT_TAIL - vector - 0xc)) # b  AT_TAIL
        li      %r3,vector
        b       tail
        .set    vector, vector + 0x20
        .endr

        . = _start + AT_TAIL
        le      0x7e9a02a6              # as above
        le      0x7ebb02a6
        le      0x7d6000a6
        le      0x696b0001
        le      0x39400000
        le      0x7d410164
        le      0x429f0005
        le      0x7d4802a6
        le      0x394a001c
        le      0x7d5a03a6
        le      0x7d7b03a6
        le      0x4c000024
tail:
        mfsrr0  %r20
        mfsrr1  %r21
        ld      %r10,AT_HANDLER(0)
        mtctr   %r10
        bctr

        . = _start + AT_HANDLER
        .quad   exception - _start      # where it is loaded is added when the image is packed

        . = _start + AT_CODE
# ---------------------------------------------------------------------------------------------- the other CPUs
slave:
        bcl     20,31,1f
1:      mflr    %r30
        addi    %r30,%r30,(params - 1b)
        addi    %r9,%r30,1
        mtsprg  3,%r9                   # one of ours, should it come to an exception
        mr      %r31,%r3                # physical id
        bl      leave_hypervisor_areas
        li      %r8,1
        sldi    %r7,%r8,32
        or      %r8,%r8,%r7             # one in either half: a count that was hit by anything else shows
        addi    %r10,%r30,P_ARRIVED
        sync                            # what this CPU wrote as K1's is in memory before anything moves
2:      ldarx   %r9,0,%r10
        add     %r9,%r9,%r8
        stdcx.  %r9,0,%r10
        bne-    2b
        ld      %r10,P_MAGIC(%r30)
3:      or      %r1,%r1,%r1             # low thread priority: leave the core to the one that works
        ld      %r9,P_RELEASED(%r30)
        cmpd    %r9,%r10
        bne     3b
        or      %r2,%r2,%r2             # medium priority again
        isync                           # nothing of K2's head was fetched before we saw the release
        mr      %r3,%r31
        li      %r10,AT_SLAVE           # K2's __secondary_hold (arch/powerpc/kernel/head_64.S)
        mtctr   %r10
        bctr

# ---------------------------------------------------------------------------------------------- the hypervisor
# A hypervisor counts a CPU's dispatches in that CPU's VPA, a page of K1's that K1 registered and, dying, leaves registered
# (pseries_kexec_cpu_down, arch/powerpc/platforms/pseries/kexec.c: up to 6.1.176 no hypervisor call in a crash; 6.1.192 and
# 7.2 take it back themselves). Where memory moves, these writes would go on into what lies there now, K2. So each CPU takes
# its own areas back; the VPA goes last, the hypervisor keeps it while the others stand.
# Clobbers what a hypercall may: r0, r3-r12, ctr, xer, cr; and r27.
leave_hypervisor_areas:
        ld      %r9,P_FIRMWARE(%r30)
        cmpdi   %r9,PAPR
        bnelr
        li      %r27,SLB_SHADOW_DEREGISTER
1:      li      %r3,H_REGISTER_VPA
        sldi    %r4,%r27,63-18
        mr      %r5,%r31
        li      %r6,0
        .long   0x44000022              # sc 1; an area that was never registered is refused, which is as good
        addi    %r27,%r27,-1
        cmpwi   %r27,VPA_DEREGISTER
        bge     1b
        blr

# ---------------------------------------------------------------------------------------------- the crashing CPU
master:
        mr      %r31,%r3                # physical id
        bcl     20,31,1f
1:      mflr    %r30
        addi    %r30,%r30,(params - 1b)
        mtsprg  3,%r30                  # the one that hands over, should it come to an exception
        li      %r9,0
        std     %r9,P_LOG_END(%r30)
        bl      leave_hypervisor_areas
        addi    %r3,%r30,(_start - params)
        li      %r4,AT_STATE
        addi    %r5,%r30,P_IMAGE_DIGEST
        bl      require
        bl      require_code            # what is used next was checked a while ago
        addi    %r3,%r30,(text_begin - params)
        bl      say

# Moving K1's text under a CPU that still executes it (kexec_wait) sends that CPU anywhere. Wait until all have left,
# but not for ever: one that is stuck never comes.
        ld      %r10,P_SLAVES_EXPECTED(%r30)
        ld      %r11,P_SLAVE_TIMEOUT(%r30)
        mftb    %r12
2:      ld      %r9,P_ARRIVED(%r30)
        srdi    %r8,%r9,32
        clrldi  %r9,%r9,32
        cmpld   %r8,%r9
        bne     3f                      # no count of ours
        cmpld   %r9,%r10
        bge     4f
3:      mftb    %r7
        subf    %r7,%r12,%r7
        cmpld   %r7,%r11
        blt     2b
4:      isync
        or.     %r9,%r10,%r8
        beq     catch_resets            # a single CPU: nothing to tell
        mr      %r22,%r8
        addi    %r3,%r30,(text_prefix - params)
        bl      say
        mr      %r3,%r22
        li      %r4,4
        bl      say_hex
        addi    %r3,%r30,(text_of - params)
        bl      say
        ld      %r3,P_SLAVES_EXPECTED(%r30)
        li      %r4,4
        bl      say_hex
        addi    %r3,%r30,(text_cpus - params)
        bl      say

# Machine checks and system resets of a partition go where K1 registered its handlers, which is text that is about to move
# (fwnmi_init, arch/powerpc/platforms/pseries/setup.c). Have them at 0x200 and 0x100, like everybody's.
# Only now: RTAS takes one call at a time, and K1's other CPUs may have been in one.
catch_resets:
        ld      %r9,P_RTAS_NMI(%r30)
        cmpdi   %r9,0
        beq     begin_rows
        stw     %r9,P_RTAS_ARGS(%r30)
        li      %r9,2                   # nargs
        stw     %r9,P_RTAS_ARGS+4(%r30)
        li      %r9,1                   # nret
        stw     %r9,P_RTAS_ARGS+8(%r30)
        li      %r9,0x100
        stw     %r9,P_RTAS_ARGS+12(%r30)
        li      %r9,0x200
        stw     %r9,P_RTAS_ARGS+16(%r30)
        bl      rtas

# ---------------------------------------------------------------------------------------------- the rows
begin_rows:
        ld      %r29,P_ROWS(%r30)
        addi    %r28,%r30,P_TABLE
next_row:
        ld      %r9,P_FAULTED(%r30)
        cmpdi   %r9,0
        bne     other_faulted
        bl      require_code
        cmpdi   %r29,0
        beq     unknown_operation       # a table ends with the entry of K2
        bl      require_row             # its text ends
        addi    %r3,%r28,ROW_TEXT
        bl      say
        bl      require_row             # a row that was hit since must not be obeyed
        ld      %r3,ROW_OPERATION(%r28)
        ld      %r4,ROW_DST(%r28)
        ld      %r5,ROW_SRC(%r28)
        ld      %r6,ROW_SIZE(%r28)
        cmpdi   %r3,OPERATION_CHECK
        beq     check_row
        cmpdi   %r3,OPERATION_ENTER
        beq     enter
        mr      %r26,%r4
        mr      %r27,%r5
        srdi.   %r6,%r6,LINE_SHIFT      # lines; a move of none is no move
        beq     row_done
        mtctr   %r6
        cmpdi   %r3,OPERATION_COPY
        beq     copy
        cmpdi   %r3,OPERATION_EXCHANGE
        beq     exchange
unknown_operation:
        addi    %r3,%r30,(text_unknown - params)        # to guess would lose K1's memory
        bl      say
        b       stop

# 64 bytes at `offset` from r27 to eight registers, and from them to the same offset from r26.
        .macro  load_half offset
        ld      %r7,\offset(%r27)
        ld      %r8,\offset+8(%r27)
        ld      %r9,\offset+16(%r27)
        ld      %r10,\offset+24(%r27)
        ld      %r11,\offset+32(%r27)
        ld      %r12,\offset+40(%r27)
        ld      %r14,\offset+48(%r27)
        ld      %r15,\offset+56(%r27)
        .endm

        .macro  store_half offset
        std     %r7,\offset(%r26)
        std     %r8,\offset+8(%r26)
        std     %r9,\offset+16(%r26)
        std     %r10,\offset+24(%r26)
        std     %r11,\offset+32(%r26)
        std     %r12,\offset+40(%r26)
        std     %r14,\offset+48(%r26)
        std     %r15,\offset+56(%r26)
        .endm

# What is moved may be executed, so each line of the destination is pushed out of the data cache (Power ISA Book II 1.8.1).
copy:
1:      load_half 0
        store_half 0
        load_half 64
        store_half 64
        dcbst   0,%r26
        addi    %r26,%r26,LINE
        addi    %r27,%r27,LINE
        bdnz    1b
        b       coherent

        .macro  exchange_half offset
        load_half \offset
        ld      %r16,\offset(%r26)
        ld      %r17,\offset+8(%r26)
        ld      %r18,\offset+16(%r26)
        ld      %r19,\offset+24(%r26)
        ld      %r20,\offset+32(%r26)
        ld      %r21,\offset+40(%r26)
        ld      %r22,\offset+48(%r26)
        ld      %r23,\offset+56(%r26)
        store_half \offset
        std     %r16,\offset(%r27)
        std     %r17,\offset+8(%r27)
        std     %r18,\offset+16(%r27)
        std     %r19,\offset+24(%r27)
        std     %r20,\offset+32(%r27)
        std     %r21,\offset+40(%r27)
        std     %r22,\offset+48(%r27)
        std     %r23,\offset+56(%r27)
        .endm

exchange:
        ld      %r9,P_ALTIVEC(%r30)
        cmpdi   %r9,1
        beq     exchange_vectors
1:      exchange_half 0
        exchange_half 64
        dcbst   0,%r26
        addi    %r26,%r26,LINE
        addi    %r27,%r27,LINE
        bdnz    1b
        b       coherent

# Half the instructions: 16 bytes at a time.
exchange_vectors:
        mfmsr   %r24
        oris    %r9,%r24,MSR_VEC
        mtmsrd  %r9
        isync
        li      %r14,16
        li      %r15,32
        li      %r16,48
        li      %r17,64
        li      %r18,80
        li      %r19,96
        li      %r20,112
        .macro  each_vector insn, first, base
        \insn   %v\first,0,\base
        .irp    n, 1,2,3,4,5,6,7
        vector_at \insn, (\first + \n), (13 + \n), \base
        .endr
        .endm
        .macro  vector_at insn, number, index, base
        \insn   \number,\index,\base
        .endm
1:      each_vector lvx, 0, %r26
        each_vector lvx, 8, %r27
        each_vector stvx, 8, %r26
        each_vector stvx, 0, %r27
        dcbst   0,%r26
        addi    %r26,%r26,LINE
        addi    %r27,%r27,LINE
        bdnz    1b
        mtmsrd  %r24
        isync

# Then drop stale instructions. r4 = dst, r6 = lines.
coherent:
        sync
        mtctr   %r6
1:      icbi    0,%r4
        addi    %r4,%r4,LINE
        bdnz    1b
        sync
        isync

row_done:
        addi    %r3,%r30,(text_ok - params)
        bl      say
row_left:
        addi    %r28,%r28,ROW_BYTES
        addi    %r29,%r29,-1
        b       next_row

check_row:
        mr      %r3,%r4
        mr      %r4,%r6
        addi    %r5,%r28,ROW_DIGEST
        bl      check
        beq     row_done
        addi    %r3,%r30,(text_damaged - params)
        bl      say
        bl      go_on_or_stop
        b       row_left

# K2's head is at physical 0 now: the others may go to its 0x60, and we to its first byte. r4 = entry, r5 = tree.
enter:
        addi    %r3,%r30,(text_newline - params)
        bl      say
        ld      %r4,ROW_DST(%r28)
        ld      %r3,ROW_SRC(%r28)
        stw     %r31,FDT_BOOT_CPUID(%r3)
        ld      %r9,P_MAGIC(%r30)
        sync
        std     %r9,P_RELEASED(%r30)
        ld      %r8,P_OPAL_BASE(%r30)
        ld      %r9,P_OPAL_ENTRY(%r30)
        li      %r5,0                   # not Open Firmware
        li      %r6,0
        li      %r7,0
        mtctr   %r4
        sync
        isync
        bctr

# ---------------------------------------------------------------------------------------------- integrity
# Sixteen CRC-32s over the words of a stretch, word after word in turn, each four bytes at a step (zlib's polynomial, reflected;
# the registers and the tables hold the CRC's bytes in memory order). A burst of up to 64 bytes leaves at most four
# neighbouring bytes in each of them, and a CRC-32 misses no burst of 32 bits: see docs/purgatory.md.
#
# r3 = address, r4 = bytes (multiple of 64), r5 = the sixteen results to expect, that of the last lane first (purgatory/digest.py
# says why). cr0.eq says that they are met.
# Clobbers r1-r27 (r1, r2 and r13 are nobody's here), not r0.
        .macro  crc_word lane, offset
        lwz     %r4,\offset(%r3)
        xor     %r4,%r4,\lane
        rlwinm  %r26,%r4,10,22,29       # four times each byte
        rlwinm  %r27,%r4,18,22,29
        rlwinm  %r2,%r4,26,22,29
        rlwinm  %r4,%r4,2,22,29
        lwzx    %r26,%r22,%r26
        lwzx    %r27,%r23,%r27
        lwzx    %r2,%r24,%r2
        lwzx    %r4,%r25,%r4
        xor     %r26,%r26,%r27
        xor     %r2,%r2,%r4
        xor     \lane,%r26,%r2
        .endm

check:
        srdi.   %r4,%r4,6
        mr      %r13,%r5
        .irp    n, 6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21
        .ifne   \n - 13
        li      %r\n,-1
        .endif
        .endr
        li      %r1,-1                  # stands in for r13
        addi    %r25,%r30,P_CRC
        addi    %r24,%r25,0x400
        addi    %r23,%r25,0x800
        addi    %r22,%r25,0xc00
        beq     2f
        mtctr   %r4
1:      crc_word %r6,0
        crc_word %r7,4
        crc_word %r8,8
        crc_word %r9,12
        crc_word %r10,16
        crc_word %r11,20
        crc_word %r12,24
        crc_word %r1,28
        crc_word %r14,32
        crc_word %r15,36
        crc_word %r16,40
        crc_word %r17,44
        crc_word %r18,48
        crc_word %r19,52
        crc_word %r20,56
        crc_word %r21,60
        addi    %r3,%r3,64
        bdnz    1b
2:      li      %r4,0
        .macro  compare lane, offset
        lwz     %r26,\offset(%r13)
        xor     %r26,%r26,\lane
        or      %r4,%r4,%r26
        .endm
        compare %r6,4
        compare %r7,8
        compare %r8,12
        compare %r9,16
        compare %r10,20
        compare %r11,24
        compare %r12,28
        compare %r1,32
        compare %r14,36
        compare %r15,40
        compare %r16,44
        compare %r17,48
        compare %r18,52
        compare %r19,56
        compare %r20,60
        compare %r21,0
        cmpwi   %r4,0
        blr

# Parts of this image must be whole: as `check`, but the answer is to return, or never to. What may be wrong with K2 is for
# the plan to risk; with a purgatory that is wrong nobody knows what it does to K1.
require_row:
        mr      %r3,%r28
        li      %r4,ROW_OWN_DIGEST
        addi    %r5,%r28,ROW_OWN_DIGEST
        b       require

require_code:
        addi    %r3,%r30,(_start + AT_CODE - params)
        li      %r4,AT_PARAMS + P_END - AT_CODE
        addi    %r5,%r30,P_CODE_DIGEST
        # fall through

require:
        mflr    %r0                     # the one register that `check` leaves alone
        bl      check
        mtlr    %r0
        beqlr
        addi    %r3,%r30,(text_self - params)
        bl      say
        b       stop

# ---------------------------------------------------------------------------------------------- the end of the road
# Damage was told. Returns if the plan wants K2 entered all the same.
go_on_or_stop:
        ld      %r9,P_ON_DAMAGE(%r30)
        cmpdi   %r9,GO_ON
        bne     stop
        addi    %r3,%r30,(text_go_on - params)
        b       say

stop:
        ld      %r9,P_ON_DAMAGE(%r30)
        cmpdi   %r9,REBOOT
        bne     halt
        addi    %r3,%r30,(text_reboot - params)
        bl      say
        ld      %r9,P_FIRMWARE(%r30)
        cmpdi   %r9,OPAL
        bne     1f
2:      li      %r0,OPAL_CEC_REBOOT
        bl      opal
        mr      %r22,%r3
        cmpdi   %r22,0
        beq     3f
        cmpdi   %r22,OPAL_BUSY
        beq     3f
        cmpdi   %r22,OPAL_BUSY_EVENT
        bne     halt
3:      li      %r0,OPAL_POLL_EVENTS    # the reboot is the firmware's own work
        addi    %r3,%r30,P_LENGTH
        bl      opal
        cmpdi   %r22,0
        beq     3b
        b       2b
1:      ld      %r9,P_RTAS_REBOOT(%r30)
        cmpdi   %r9,0
        beq     halt
        stw     %r9,P_RTAS_ARGS(%r30)
        li      %r9,0                   # nargs
        stw     %r9,P_RTAS_ARGS+4(%r30)
        li      %r9,1                   # nret
        stw     %r9,P_RTAS_ARGS+8(%r30)
        bl      rtas
halt:
        addi    %r3,%r30,(text_halt - params)
        bl      say
halted:
        or      %r1,%r1,%r1
        b       halted

# An exception taken at one of our vectors: r3 = which, r20 and r21 = SRR0 and SRR1. On whichever CPU, at whatever point.
# A CPU that never came here is one that K1 lost hold of: with interrupts off, at a standstill, it does the least harm.
exception:
        bcl     20,31,1f
1:      mflr    %r30
        addi    %r30,%r30,(params - 1b)
        addi    %r9,%r3,-0xe00          # a hypervisor interrupt, 0xe00 to 0xea0 or 0xf80, has registers of its own
        cmpldi  %r9,0xa0
        ble     2f
        cmpdi   %r3,0xf80
        bne     3f
2:      mfspr   %r20,314                # HSRR0, HSRR1
        mfspr   %r21,315
3:      mfsprg  %r9,3
        subf    %r9,%r30,%r9            # 0: the crashing CPU, 1: another that came
        cmpdi   %r9,0
        beq     5f
        cmpdi   %r9,1
        bne     halted

# Only one CPU speaks. This one notes the first exception of its kind, for next_row to find.
        addi    %r10,%r30,P_FAULT_CLAIM
4:      ldarx   %r9,0,%r10
        cmpdi   %r9,0
        bne     halted
        li      %r9,1
        stdcx.  %r9,0,%r10
        bne-    4b
        std     %r3,P_FAULT_VECTOR(%r30)
        std     %r20,P_FAULT_SRR0(%r30)
        std     %r21,P_FAULT_SRR1(%r30)
        sync
        std     %r9,P_FAULTED(%r30)
        b       halted

5:      ld      %r9,P_FAULTED_HERE(%r30)
        cmpdi   %r9,0
        bne     halted                  # telling the first one brought this one about
        li      %r9,1
        std     %r9,P_FAULTED_HERE(%r30)
tell_fault:
        mr      %r22,%r3
        addi    %r3,%r30,(text_exception - params)
        bl      say
        mr      %r3,%r22
        li      %r4,4
        bl      say_hex
        addi    %r3,%r30,(text_at - params)
        bl      say
        mr      %r3,%r20
        li      %r4,16
        bl      say_hex
        addi    %r3,%r30,(text_srr1 - params)
        bl      say
        mr      %r3,%r21
        li      %r4,16
        bl      say_hex
        b       stop

other_faulted:
        isync                           # what was noted is read after the word that says so
        ld      %r3,P_FAULT_VECTOR(%r30)
        ld      %r20,P_FAULT_SRR0(%r30)
        ld      %r21,P_FAULT_SRR1(%r30)
        b       tell_fault

# ---------------------------------------------------------------------------------------------- what it says
# r3 as r4 hexadecimal digits, 0x before them. Clobbers what `say` does.
say_hex:
        addi    %r5,%r30,P_DIGITS
        li      %r6,'0'
        stb     %r6,0(%r5)
        li      %r6,'x'
        stb     %r6,1(%r5)
        addi    %r5,%r5,2
        mtctr   %r4
        add     %r5,%r5,%r4
        li      %r6,0
        stb     %r6,0(%r5)
1:      clrldi  %r6,%r3,60
        srdi    %r3,%r3,4
        cmpdi   %r6,10
        addi    %r6,%r6,'0'
        blt     2f
        addi    %r6,%r6,'a' - '0' - 10
2:      stbu    %r6,-1(%r5)
        bdnz    1b
        addi    %r3,%r30,P_DIGITS
        # fall through

# The text at r3, up to its NUL, to the log and to the machine's console. Nothing waits for a console for ever.
# Clobbers r0, r2-r12, r23-r27, ctr, xer, cr.
say:
        mflr    %r27
        mr      %r26,%r3
        ld      %r4,P_LOG_END(%r30)
        addi    %r5,%r30,P_LOG
        li      %r25,0                  # length
1:      lbzx    %r6,%r26,%r25
        cmpdi   %r6,0
        beq     3f
        cmpldi  %r4,LOG_SIZE - 1
        bge     2f
        stbx    %r6,%r5,%r4
        addi    %r4,%r4,1
2:      addi    %r25,%r25,1
        b       1b
3:      std     %r4,P_LOG_END(%r30)
        ld      %r9,P_CONSOLE(%r30)
        cmpdi   %r9,-1
        beq     said
        mftb    %r24
        ld      %r9,P_FIRMWARE(%r30)
        cmpdi   %r9,PAPR
        beq     say_papr
        cmpdi   %r9,OPAL
        beq     say_opal
said:
        mtlr    %r27
        blr

# Sixteen characters at a time, in two registers.
say_papr:
        cmpdi   %r25,0
        beq     said
        li      %r23,16
        cmpdi   %r25,16
        bge     1f
        mr      %r23,%r25
1:      li      %r3,H_PUT_TERM_CHAR
        ld      %r4,P_CONSOLE(%r30)
        mr      %r5,%r23
        ld      %r6,0(%r26)
        ld      %r7,8(%r26)
        .long   0x44000022              # sc 1
        cmpdi   %r3,0
        bne     2f
        add     %r26,%r26,%r23
        subf    %r25,%r23,%r25
        b       say_papr
2:      cmpdi   %r3,H_BUSY
        beq     3f
        addi    %r3,%r3,-H_LONG_BUSY
        cmpldi  %r3,5
        bgt     said
3:      bl      patience
        blt     1b
        b       said

# cr0.lt says that there is time left for this text, which began at r24.
patience:
        mftb    %r3
        subf    %r3,%r24,%r3
        ld      %r4,P_CONSOLE_TIMEOUT(%r30)
        cmpld   %r3,%r4
        blr

say_opal:
        cmpdi   %r25,0
        beq     said
        std     %r25,P_LENGTH(%r30)
        li      %r0,OPAL_CONSOLE_WRITE
        ld      %r3,P_CONSOLE(%r30)
        addi    %r4,%r30,P_LENGTH
        mr      %r5,%r26
        bl      opal
        cmpdi   %r3,OPAL_BUSY
        beq     1f
        cmpdi   %r3,OPAL_BUSY_EVENT
        beq     1f
        cmpdi   %r3,0
        bne     said
        ld      %r4,P_LENGTH(%r30)      # as much as it took
        cmpld   %r4,%r25
        bgt     said
        add     %r26,%r26,%r4
        subf    %r25,%r4,%r25
1:      li      %r0,OPAL_POLL_EVENTS    # moves what it took on to the wire
        addi    %r3,%r30,P_LENGTH
        bl      opal
        bl      patience
        blt     say_opal
        b       said

# ---------------------------------------------------------------------------------------------- firmware
# r0 = token, r3-r5 = arguments. Clobbers what a function may (skiboot asm/head.S, opal_entry).
opal:
        ld      %r2,P_OPAL_BASE(%r30)
        ld      %r12,P_OPAL_ENTRY(%r30)
        mtctr   %r12
        bctr                            # returns to our caller

# The call laid out at P_RTAS_ARGS: 32-bit real mode (PAPR 7.2.6; enter_rtas, arch/powerpc/kernel/rtas_entry.S).
rtas:
        mflr    %r27
        addi    %r3,%r30,P_RTAS_ARGS
        ld      %r4,P_RTAS_BASE(%r30)
        ld      %r5,P_RTAS_ENTRY(%r30)
        bcl     20,31,1f
1:      mflr    %r6
        addi    %r6,%r6,(2f - 1b)
        mtlr    %r6
        li      %r6,0
        mtcr    %r6                     # as the kernel does, for the sake of some RTAS
        mfmsr   %r26
        clrldi  %r7,%r26,1              # MSR.SF off
        li      %r8,0
        mtmsrd  %r8,1                   # MSR.RI off: srr0/srr1 are about to be ours
        mtsrr0  %r5
        mtsrr1  %r7
        rfid
2:      li      %r8,1                   # it gives back the lower halves of registers only: MSR.SF again, lr and params
        rldimi  %r26,%r8,63,0
        mtmsrd  %r26
        isync
        clrldi  %r27,%r27,32            # all of us lies below 4 GiB, or RTAS would not have been called
        clrldi  %r30,%r30,32
        clrldi  %r31,%r31,32            # an id has 32 bits
        mtlr    %r27
        blr

# ---------------------------------------------------------------------------------------------- texts
text_begin:     .asciz  "\ncrashkernel: K1 is dead, its purgatory is whole\n"
text_prefix:    .asciz  "crashkernel: "
text_of:        .asciz  " of "
text_cpus:      .asciz  " other CPUs came\n"
text_ok:        .asciz  " ok\n"
text_newline:   .asciz  "\n"
text_damaged:   .asciz  " DAMAGED"
text_self:      .asciz  "\ncrashkernel: the purgatory itself is DAMAGED"
text_unknown:   .asciz  " is no operation"
text_exception: .asciz  "\ncrashkernel: exception "
text_at:        .asciz  " at "
text_srr1:      .asciz  " srr1 "
text_go_on:     .asciz  ", going on as told\n"
text_reboot:    .asciz  ", rebooting\n"
text_halt:      .asciz  ", halted\n"

# ---------------------------------------------------------------------------------------------- parameters
        . = _start + AT_PARAMS
params:
        .ascii  "CRASHPRG"
        . = _start + AT_STATE + STATE_SIZE
