; The smallest vmlinux: an ELF file with one segment, loaded and entered as a 64-bit Linux kernel is. Its first
; exit is a newline on the serial port, which the monitor hands on at once: from outside that tells when
; the guest began to run. Then it restarts the machine through the keyboard controller, which ends it.
bits 64
org 0x100000

header:                             ; Elf64_Ehdr
    db 0x7F, "ELF", 2, 1, 1, 0      ; 64-bit, little-endian, version 1
    dq 0
    dw 2, 62                        ; an executable for x86-64
    dd 1
    dq entry
    dq load - header                ; where the program headers begin
    dq 0                            ; no section headers
    dd 0
    dw 64, 56, 1, 0, 0, 0           ; sizes of the headers; one program header

load:                               ; Elf64_Phdr
    dd 1, 5                         ; PT_LOAD, readable and executable
    dq 0, header, header            ; the whole file, at its virtual and its physical address
    dq end - header, end - header
    dq 0x1000

entry:
    mov dx, 0x3F8                   ; COM1
    mov al, 10
    out dx, al
    mov al, 0xFE                    ; pulse the reset line
    out 0x64, al
.wait:
    hlt
    jmp .wait
end:
