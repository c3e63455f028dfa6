; Jumps to where no memory is. Data may be read from there (that is how devices work: an MMIO exit
; asks the host for the bytes), but instructions may not: KVM would have to emulate one without being
; able to fetch it, and ends with KVM_EXIT_INTERNAL_ERROR.
bits 16
org 0x1000

    jmp 0x4000:0                ; physical address 0x40000
