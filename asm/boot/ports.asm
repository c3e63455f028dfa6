; A boot sector that asks the old ports of a PC what they know: 0x61, timer and speaker; 0x64 and 0x92, A20; the
; screen's beam and cursor. It ends with the number of the first check that fails, or 0.
bits 16
org 0x7C00

%include "ports.inc"

TIMER2      equ 0x42
TIMER       equ 0x43
PORT_61     equ 0x61            ; bit 0: timer 2 counts, 1: the speaker hears it, 4: memory's refresh, 5: timer 2's output
KEY_DATA    equ 0x60
KEY_COMMAND equ 0x64
FAST_A20    equ 0x92
CRTC        equ 0x3D4
BEAM        equ 0x3DA

; Announces check %1 to `failed`.
%macro CHECK 1
    mov bl, %1
%endmacro

    cli                         ; the BIOS would take the controller's answers for keys
    xor ax, ax
    mov ss, ax
    mov sp, 0x7C00

    CHECK 1                     ; the two bits that can be written
    mov ah, 3
.bits:
    mov al, ah
    out PORT_61, al
    in al, PORT_61
    and al, 3
    cmp al, ah
    jne failed
    dec ah
    jns .bits

    CHECK 2                     ; refresh, both ways
    mov dx, PORT_61
    mov ah, 1 << 4
    call both

    CHECK 3                     ; timer 2 counts to 0, once: its output is low until then
    mov cx, 100                 ; a busy host may miss it
    mov al, 1
    out PORT_61, al
.start:
    mov al, 0xB0                ; both bytes, mode 0
    out TIMER, al
    mov al, 0xFF
    out TIMER2, al
    out TIMER2, al
    in al, PORT_61
    test al, 1 << 5
    loopnz .start
    jnz failed
.count:
    in al, PORT_61
    test al, 1 << 5
    jz .count

    CHECK 4                     ; the beam, both ways
    mov dx, BEAM
    mov ah, 1 << 0
    call both
    mov ah, 1 << 3
    call both

    CHECK 5                     ; the cursor's cell
    mov dx, CRTC
    mov ax, 0x050E
    out dx, ax
    mov ax, 0xDC0F
    out dx, ax
    inc dx
    in al, dx
    cmp al, 0xDC
    jne failed
    dec dx
    mov al, 0x0E
    out dx, al
    inc dx
    in al, dx
    cmp al, 0x05
    jne failed

    CHECK 6                     ; A20 in the keyboard controller's output port, as xv6 opens it
    mov al, 0xDF
    call write_output
    call a20
    cmp ax, 0x0202
    jne failed
    CHECK 7                     ; shut by one, shut by the other
    mov al, 0xDD
    call write_output
    call a20
    test ax, ax
    jnz failed
    CHECK 8
    mov al, 0x02
    out FAST_A20, al
    call a20
    cmp ax, 0x0202
    jne failed

    mov bl, 0
failed:
    mov al, bl
    out DEBUG_EXIT, al
    jmp $

; Waits until the bit AH of port DX is 1 and then until it is 0.
both:
    in al, dx
    test al, ah
    jz both
.low:
    in al, dx
    test al, ah
    jnz .low
    ret

; Waits until the controller takes a byte.
ready:
    push ax
.busy:
    in al, KEY_COMMAND
    test al, 1 << 1
    jnz .busy
    pop ax
    ret

; Writes AL to the output port.
write_output:
    call ready
    push ax
    mov al, 0xD1
    out KEY_COMMAND, al
    pop ax
    call ready
    out KEY_DATA, al
    ret

; A20 as the controller has it in AL, as port 0x92 has it in AH; both in bit 1.
a20:
    call ready
    mov al, 0xD0
    out KEY_COMMAND, al
.wait:
    in al, KEY_COMMAND
    test al, 1 << 0
    jz .wait
    in al, FAST_A20
    mov ah, al
    in al, KEY_DATA
    and ax, 0x0202
    ret

    times 510 - ($ - $$) db 0
    dw 0xAA55
