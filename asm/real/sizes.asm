; Reads and writes a device in every size and alignment, and says on the serial port before each access
; which one comes, so that it can be seen which exits it causes.
;
; The device has two pages at 0xA0000, directly behind the RAM. What the reads gave stands at 0x2000.
bits 16
org 0x1000
%include "hypercall.inc"

SERIAL      equ 0x3F8
LAST_RAM    equ 0x9FF0              ; a segment whose first 256 bytes are the last of the RAM
DEVICE      equ 0xA000
results     equ 0x2000
PAST        equ 0xA1F0              ; a segment whose first 256 bytes are the last of the device

; Prints a line, and then does the instruction that it shows.
%macro SHOW 2
    mov si, %%text
    mov cx, %%end - %%text
    mov dx, SERIAL
    rep outsb
    jmp %%end
%%text:
    db %1, 10
%%end:
    %2
%endmacro

    cld
    mov ax, DEVICE
    mov es, ax
    mov ax, LAST_RAM
    mov fs, ax
    mov ax, PAST
    mov gs, ax

    SHOW "1 byte:   mov byte [0xA0000], 0x11", {mov byte [es:0], 0x11}
    SHOW "2 bytes:  mov word [0xA0002], 0x2222", {mov word [es:2], 0x2222}
    SHOW "4 bytes:  mov dword [0xA0004], 0x44444444", {mov dword [es:4], 0x44444444}

    ; 8 bytes at once: an MMX register holds them also in real mode.
    movq mm0, [pattern]
    SHOW "8 bytes:  movq [0xA0008], mm0", {movq [es:8], mm0}
    SHOW "unaligned: mov dword [0xA0013], 0x55667788", {mov dword [es:0x13], 0x55667788}
    SHOW "across a page: mov dword [0xA0FFE], 0x99AABBCC", {mov dword [es:0xFFE], 0x99AABBCC}
    SHOW "from RAM into the device: mov dword [0x9FFFE], 0xDDEEFF00", {mov dword [fs:0xFE], 0xDDEEFF00}
    SHOW "past the device's end: mov dword [0xA1FFE], 0x0BADF00D", {mov dword [gs:0xFE], 0x0BADF00D}

    SHOW "read 1 byte:  mov al, [0xA0000]", {mov al, [es:0]}
    mov [results], al
    SHOW "read 4 bytes: mov eax, [0xA0004]", {mov eax, [es:4]}
    mov [results + 4], eax
    SHOW "read 8 bytes: movq mm1, [0xA0008]", {movq mm1, [es:8]}
    movq [results + 8], mm1
    SHOW "read across a page: mov eax, [0xA0FFE]", {mov eax, [es:0xFFE]}
    mov [results + 16], eax
    SHOW "read from RAM into the device: mov eax, [0x9FFFE]", {mov eax, [fs:0xFE]}
    mov [results + 20], eax
    SHOW "read past the device's end: mov eax, [0xA1FFE]", {mov eax, [gs:0xFE]}
    mov [results + 24], eax

    SHOW "read, change, write: inc byte [0xA0000]", {inc byte [es:0]}

    mov ax, 0x7777
    mov di, 0x20
    mov bx, 3
    SHOW "three words: mov cx, 3; rep stosw", {mov cx, bx}
    rep stosw
    END_WELL

pattern:    dq 0x8877665544332211
