; A guest that never knew another mode: the host put it straight into long mode (KVM_SET_SREGS).
bits 64
org 0x1000

%include "modes.inc"

    mov esp, 0x1000
    SAY "long mode: 64 bits, and this is my first instruction", 13, 10
    ; The same place where the climb records its last stop, so that the host can compare.
    RECORD_MODE 4
    END 0
