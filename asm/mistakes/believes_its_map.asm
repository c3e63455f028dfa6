; A kernel that does what a kernel does with its memory map (e820): it puts something at the very end of what is called RAM.
; Here it is its stack. Where the map boasts, no memory is there: what the call pushes is lost, and the return pops
; what a bus without a device answers.
%include "vmlinux.inc"

; struct boot_params, at which RSI points (Linux, Documentation/arch/x86/zero-page.rst).
E820_ENTRIES        equ 0x1E8
E820_TABLE          equ 0x2D0
E820_ENTRY_SIZE     equ 20          ; address, size, type

entry:
    movzx ecx, byte [rsi + E820_ENTRIES]
    imul ecx, ecx, E820_ENTRY_SIZE
    lea rdi, [rsi + E820_TABLE + rcx - E820_ENTRY_SIZE]
    mov rsp, [rdi]                  ; the last entry's address
    add rsp, [rdi + 8]              ; and size
    call work
    xor eax, eax
    out 0xF4, al                    ; the debug-exit port: all is well
.wait:
    hlt
    jmp .wait
work:
    ret
end:
