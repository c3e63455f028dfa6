; HLT with interrupts off.
bits 64
org 0x1000

    cli
    hlt
