; An instruction that raises #UD on purpose, before there is an IDT.
bits 64
org 0x1000

    ud2
