; A Multiboot kernel for several processors: what a system does with the MP table, step by step, and each checked. It
; finds the table, pages with 4 MiB pages, starts each processor by INIT and STARTUP, has each take interrupts of its
; local APIC's timer, has the last one take those of the I/O APIC, and resets the first one to where it wants.
bits 32
org 0x100000

FLAGS       equ HAS_ADDRESSES
%include "multiboot.inc"

TRAMPOLINE  equ 0x8000          ; where the others begin, in real mode: a page below 1 MiB
CPUS_MAX    equ 16
ALIAS       equ 0x80000000      ; physical memory from 0 on, once more
STACK       equ 0x1000

; Registers of the local APIC (SDM vol. 3, table 12-1).
APIC_ID     equ 0x20
APIC_EOI    equ 0xB0
APIC_SVR    equ 0xF0
APIC_ICR    equ 0x300
APIC_ICR_HIGH equ 0x310
APIC_TIMER  equ 0x320
APIC_COUNT  equ 0x380
APIC_DIVIDE equ 0x3E0
PERIODIC    equ 1 << 17
MASKED      equ 1 << 16
INIT        equ 0x4500          ; assert
STARTUP     equ 0x4600

TIMER       equ 0x40            ; vectors
LINE        equ 0x41
SPURIOUS    equ 0xFF
TICKS       equ 3

; Ends the guest with a text unless the flags say so.
%macro EXPECT 2+
    j%1 %%well
    PRINT %2, 10
    END_BADLY
    jmp $
%%well:
%endmacro

; Waits until a comparison holds, but not for ever: AWAIT e, cmp, [address], register.
%macro AWAIT 4
    mov ecx, 1 << 28
%%again:
    pause
    %2 %3, %4
    j%1 %%well
    loop %%again
    PRINT "waited in vain", 10
    END_BADLY
    jmp $
%%well:
%endmacro

entry:
    mov esp, stacks + STACK
    lgdt [gdt.pointer]
    jmp 0x08:.reloaded
.reloaded:
    LOAD_DATA_SEGMENTS

    mov al, 0xFF                ; nothing comes by the PICs
    out 0x21, al
    out 0xA1, al

    ; The floating pointer, at a multiple of 16 in the ROM.
    mov ebx, 0xF0000
.look:
    cmp dword [ebx], '_MP_'
    jne .no
    mov esi, ebx
    mov ecx, 16
    call sum
    je .found
.no:
    add ebx, 16
    cmp ebx, 0x100000
    jb .look
    cmp eax, eax
    EXPECT ne, "there is no MP table"
.found:
    cmp byte [ebx + 11], 0
    EXPECT e, "a default configuration"
    mov ebx, [ebx + 4]
    cmp dword [ebx], 'PCMP'
    EXPECT e, "no configuration table"
    mov esi, ebx
    movzx ecx, word [ebx + 4]
    call sum
    EXPECT e, "a bad checksum"
    mov eax, [ebx + 36]
    mov [apic], eax
    movzx edx, word [ebx + 34]  ; entries
    lea ebp, [ebx + 44]
.entry:
    mov al, [ebp]
    cmp al, 0
    je .processor
    cmp al, 2
    je .ioapic
    cmp al, 3
    jne .other
    cmp word [ebp + 4], 0       ; line 0 of bus 0
    jne .other
    mov al, [ebp + 7]
    mov [pin], al
    jmp .other
.processor:
    mov ecx, [cpus]
    mov al, [ebp + 1]
    mov [ids + ecx], al
    inc dword [cpus]
    add ebp, 20
    jmp .next
.ioapic:
    mov al, [ebp + 1]
    mov [ioapic_id], al
    mov eax, [ebp + 4]
    mov [ioapic], eax
.other:
    add ebp, 8
.next:
    dec edx
    jnz .entry
    PRINT "processors "
    mov eax, [cpus]
    call print_digit

    ; Page directory: each entry maps 4 MiB, to themselves.
    mov edi, directory
    mov eax, LARGE | WRITABLE | PRESENT
    mov ecx, 1024
.page:
    stosd
    add eax, 1 << 22
    loop .page
    mov dword [directory + (ALIAS >> 22) * 4], LARGE | WRITABLE | PRESENT
    call enable_paging
    cmp dword [ALIAS + header], HEADER_MAGIC
    EXPECT e, "the large page is not where it should be"
    mov dword [ALIAS + check], 0x12345678
    cmp dword [check], 0x12345678
    EXPECT e, "the large page leads elsewhere"

    ; All gates lead to a handler: exceptions say so.
    mov edi, idt
    mov ecx, 256
.gate:
    mov eax, exception
    call set_gate
    loop .gate
    mov edi, idt + TIMER * 8
    mov eax, on_timer
    call set_gate
    mov edi, idt + LINE * 8
    mov eax, on_line
    call set_gate
    mov edi, idt + SPURIOUS * 8
    mov eax, on_spurious
    call set_gate

    ; This processor, and then the others.
    call cpu_init
    mov esi, trampoline
    mov edi, TRAMPOLINE
    mov ecx, trampoline.end - trampoline
    rep movsb
    mov al, 0x0F                ; for processors that know no STARTUP (MP specification, B.4)
    out 0x70, al
    mov al, 0x0A
    out 0x71, al
    mov dword [0x467], TRAMPOLINE >> 4 << 16
    mov ebx, 1
.start:
    cmp ebx, [cpus]
    jae .started
    mov eax, ebx
    shl eax, 12
    add eax, stacks + STACK
    mov [ap_stack], eax
    movzx edx, byte [ids + ebx]
    shl edx, 24
    mov edi, [apic]
    mov [edi + APIC_ICR_HIGH], edx
    mov dword [edi + APIC_ICR], INIT
    mov ecx, 10000
    loop $
    mov [edi + APIC_ICR_HIGH], edx
    mov dword [edi + APIC_ICR], STARTUP | TRAMPOLINE >> 12
    inc ebx
    AWAIT e, cmp, [ready], ebx
    jmp .start
.started:
    PRINT "ready "
    mov eax, [ready]
    call print_digit

    ; Each has counted its own timer's interrupts.
    xor ebx, ebx
.count:
    movzx eax, byte [ids + ebx]
    cmp dword [ticks + eax * 4], TICKS
    EXPECT ae, "a timer has not interrupted its processor"
    inc ebx
    cmp ebx, [cpus]
    jb .count

    ; The I/O APIC has the ID that the table says. Line 0, the PIT's, to the last processor.
    mov edi, [ioapic]
    mov dword [edi], 0
    mov eax, [edi + 0x10]
    shr eax, 24
    cmp al, [ioapic_id]
    EXPECT e, "another I/O APIC than the table's"
    mov ebx, [cpus]
    movzx eax, byte [ids + ebx - 1]
    mov [last], eax
    shl eax, 24
    movzx ebx, byte [pin]
    lea ebx, [0x10 + ebx * 2]
    inc ebx
    mov [edi], ebx
    mov [edi + 0x10], eax
    dec ebx
    mov [edi], ebx
    mov dword [edi + 0x10], LINE ; fixed, physical, edge
    mov al, 0x34                ; the PIT's channel 0 in mode 2, 100 times a second
    out 0x43, al
    mov al, 11932 & 0xFF
    out 0x40, al
    mov al, 11932 >> 8
    out 0x40, al
    sti
    AWAIT ae, cmp, dword [lines], TICKS
    cli
    mov [edi], ebx
    mov dword [edi + 0x10], MASKED
    mov eax, [line_cpu]
    cmp eax, [last]
    EXPECT e, "another processor than the last took the interrupt of line 0"
    PRINT "line 0 at "
    call print_digit

    ; An INIT to itself is a reset, and the BIOS goes where the warm reset vector says.
    mov al, 0x0F
    out 0x70, al
    mov al, 0x0A
    out 0x71, al
    mov dword [0x467], (TRAMPOLINE >> 4 << 16) + trampoline.warm - trampoline
    mov edi, [apic]
    mov eax, [edi + APIC_ID]
    mov [edi + APIC_ICR_HIGH], eax
    mov dword [edi + APIC_ICR], INIT
    mov ecx, 1 << 28
    loop $
    cmp eax, eax
    EXPECT ne, "no reset"

; What every processor does for itself: descriptors, its local APIC, three interrupts of its timer.
cpu_init:
    lidt [idt_pointer]
    mov edi, [apic]
    mov dword [edi + APIC_SVR], 1 << 8 | SPURIOUS
    mov eax, 1
    cpuid
    shr ebx, 24
    mov eax, [edi + APIC_ID]
    shr eax, 24
    cmp eax, ebx
    EXPECT e, "CPUID and the local APIC disagree about the ID"
    mov ebx, eax
    mov dword [edi + APIC_DIVIDE], 0x0B ; by 1
    mov dword [edi + APIC_TIMER], PERIODIC | TIMER
    mov dword [edi + APIC_COUNT], 1000000
    sti
    AWAIT ae, cmp, dword [ticks + ebx * 4], TICKS
    cli
    mov dword [edi + APIC_TIMER], MASKED | TIMER
    mov dword [edi + APIC_COUNT], 0
    inc dword [ready]           ; they come one after the other
    ret

enable_paging:
    mov eax, cr4
    or eax, CR4_PSE
    mov cr4, eax
    mov eax, directory
    mov cr3, eax
    mov eax, cr0
    or eax, CR0_PG
    mov cr0, eax
    ret

; Another processor, in protected mode.
ap_entry:
    LOAD_DATA_SEGMENTS
    mov esp, [ap_stack]
    call enable_paging
    call cpu_init
    sti
.wait:
    hlt                         ; there is always another interrupt to come
    jmp .wait

on_timer:
    push eax
    push edi
    mov edi, [apic]
    mov eax, [edi + APIC_ID]
    shr eax, 24
    inc dword [ticks + eax * 4]
    mov dword [edi + APIC_EOI], 0
    pop edi
    pop eax
    iret

on_line:
    push eax
    push edi
    mov edi, [apic]
    mov eax, [edi + APIC_ID]
    shr eax, 24
    mov [line_cpu], eax
    inc dword [lines]
    mov dword [edi + APIC_EOI], 0
    pop edi
    pop eax
on_spurious:
    iret

exception:
    PRINT "an exception", 10
    END_BADLY
    jmp $

; The gate at EDI leads to EAX. EDI goes on to the next. Changes EAX.
set_gate:
    mov [edi], ax
    mov word [edi + 2], 0x08
    mov word [edi + 4], 0x8E00  ; present, 32-bit interrupt gate
    shr eax, 16
    mov [edi + 6], ax
    add edi, 8
    ret

; Whether ECX bytes at ESI add up to 0. Changes AL, ECX, ESI.
sum:
    mov al, 0
.byte:
    add al, [esi]
    inc esi
    loop .byte
    cmp al, 0
    ret

; Prints EAX, a digit, and ends the line.
print_digit:
    add al, '0'
    mov edx, COM1
    out dx, al
    mov al, 10
    out dx, al
    ret

; Copied to TRAMPOLINE.
bits 16
trampoline:
    cli
    xor ax, ax
    mov ds, ax
    lgdt [TRAMPOLINE + .gdt - trampoline]
    mov eax, cr0
    or al, CR0_PE
    mov cr0, eax
    jmp dword 0x08:ap_entry
.warm:
    mov dx, COM1
    mov cx, .text_end - .text
    push cs
    pop ds
    mov si, .text - trampoline
    cld
    rep outsb
    END_WELL
    jmp $
.text db "reset", 10
.text_end:
.gdt:
    dw gdt.pointer - gdt - 1
    dd gdt
.end:

    align 4
idt_pointer:
    dw 256 * 8 - 1
    dd idt
    align 4
end:

; Not in the file, and clear.
cpus        equ end
ready       equ end + 4
apic        equ end + 8
ioapic      equ end + 12
ap_stack    equ end + 16
last        equ end + 20
lines       equ end + 24
line_cpu    equ end + 28
check       equ end + 32
pin         equ end + 36
ioapic_id   equ end + 37
ids         equ end + 40
ticks       equ ids + 256
idt         equ ticks + 256 * 4
idt_end     equ idt + 256 * 8
directory   equ header + ((idt_end - header + 0xFFF) / 0x1000) * 0x1000
stacks      equ directory + 0x1000
bss_end     equ stacks + CPUS_MAX * STACK
