; The climb from real mode to long mode, with a stop at every mode on the way. (Intel SDM vol. 3, 11.9
; "Mode switching"; 5.3 to 5.5 on the three kinds of paging.)
;
; At each stop the guest says where it is, records its control registers, and from the first paging mode
; on writes a word through an address that only paging makes valid. The host finds the words at the
; physical addresses below.
bits 16
org 0x1000

%include "modes.inc"

; Tables, each a page.
DIRECTORY   equ 0x10000         ; 32-bit paging
PDPT        equ 0x11000         ; PAE: four entries
PD_LOW      equ 0x12000         ;   first GiB
PD_HIGH     equ 0x13000         ;   third GiB
PML4        equ 0x14000         ; long mode
PDPT_LOW    equ 0x15000
PDPT_HIGH   equ 0x16000
PD_LONG     equ 0x17000
TABLES_END  equ 0x18000

; A virtual address that is no physical one, and where each kind of paging leads it.
PSE_VIRTUAL equ 0x40000000      ; 1 GiB
PSE_PHYSICAL equ 0x400000
PAE_VIRTUAL equ 0x80000000      ; 2 GiB
PAE_PHYSICAL equ 0x600000
LONG_VIRTUAL equ 0x4000000000   ; 256 GiB: 32 bits cannot even name it
LONG_PHYSICAL equ 0x800000

    jmp start
    align 8
; Filled by the host if a kernel waits to be entered: its entry point, and what it wants in RDI.
kernel_entry:
    dq 0
boot_info:
    dq 0

start:
    cli
    cld
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov sp, 0x1000
    SAY "real mode: 16 bits, segment times 16 plus offset, no protection", 13, 10
    RECORD_MODE 0

    ; Protected mode: segments come from a table from here on. The far jump loads CS from it. (SDM vol.
    ; 3,
    ; 11.9.1. A PC would have to open the A20 gate first; here it always is.)
    ; ANCHOR: protected
    lgdt [gdt_pointer]
    mov eax, cr0
    or eax, CR0_PE
    mov cr0, eax
    jmp CODE32:protected
    ; ANCHOR_END: protected

bits 32
protected:
    mov ax, DATA
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov esp, 0x1000
    SAY "protected mode: 32 bits, segments from the GDT, still no paging", 13, 10
    RECORD_MODE 1

    ; Empty tables.
    mov edi, DIRECTORY
    mov ecx, (TABLES_END - DIRECTORY) / 4
    xor eax, eax
    rep stosd

    ; 32-bit paging: one table of 1024 entries of 4 bytes. With CR4.PSE each maps 4 MiB itself.
    mov dword [DIRECTORY], 0 | PRESENT | WRITABLE | LARGE
    mov dword [DIRECTORY + (PSE_VIRTUAL >> 22) * 4], PSE_PHYSICAL | PRESENT | WRITABLE | LARGE
    mov eax, cr4
    or eax, CR4_PSE
    mov cr4, eax
    mov eax, DIRECTORY
    mov cr3, eax
    mov eax, cr0
    or eax, CR0_PG
    mov cr0, eax
    mov dword [PSE_VIRTUAL], "PSE!"
    SAY "32-bit paging: one level, pages of 4 MiB", 13, 10
    RECORD_MODE 2

    ; PAE: entries of 8 bytes reach beyond 4 GiB of physical memory, so a table holds only 512, and a
    ; table of four is put above. Paging goes off in between; this code is mapped to itself, so it does
    ; not notice.
    mov eax, cr0
    and eax, ~CR0_PG
    mov cr0, eax
    mov dword [PDPT + 0 * 8], PD_LOW | PRESENT
    mov dword [PDPT + (PAE_VIRTUAL >> 30) * 8], PD_HIGH | PRESENT
    mov dword [PD_LOW], 0 | PRESENT | WRITABLE | LARGE
    mov dword [PD_HIGH], PAE_PHYSICAL | PRESENT | WRITABLE | LARGE
    mov eax, cr4
    or eax, CR4_PAE
    mov cr4, eax
    mov eax, PDPT
    mov cr3, eax
    mov eax, cr0
    or eax, CR0_PG
    mov cr0, eax
    mov dword [PAE_VIRTUAL], "PAE!"
    SAY "PAE paging: entries of 64 bits, pages of 2 MiB", 13, 10
    RECORD_MODE 3

    ; Long mode: EFER.LME asks for it, paging with PAE and four levels switches it on. The processor is
    ; in its 32-bit compatibility mode then, until the far jump loads a segment with the L bit. (SDM vol.
    ; 3, 11.8.5.)
    mov eax, cr0
    and eax, ~CR0_PG
    mov cr0, eax
    ; ANCHOR: long
    mov dword [PML4], PDPT_LOW | PRESENT | WRITABLE
    mov dword [PDPT_LOW], PD_LONG | PRESENT | WRITABLE
    mov dword [PDPT_LOW + (LONG_VIRTUAL >> 30) * 8], PDPT_HIGH | PRESENT | WRITABLE
    mov dword [PDPT_HIGH], LONG_PHYSICAL | PRESENT | WRITABLE | LARGE
    ; The first GiB to itself.
    mov edi, PD_LONG
    mov eax, PRESENT | WRITABLE | LARGE
    mov ecx, 512
.page:
    mov [edi], eax
    add eax, 2 << 20
    add edi, 8
    loop .page
    mov eax, PML4
    mov cr3, eax
    mov ecx, EFER
    rdmsr
    or eax, EFER_LME
    wrmsr
    mov eax, cr0
    or eax, CR0_PG
    mov cr0, eax
    jmp CODE64:long_mode
    ; ANCHOR_END: long

bits 64
long_mode:
    mov esp, 0x1000
    mov rax, LONG_VIRTUAL
    mov dword [rax], "LONG"
    SAY "long mode: 64 bits, four levels of tables", 13, 10
    RECORD_MODE 4

    mov rdi, [boot_info]
    mov rax, [kernel_entry]
    test rax, rax
    jz .end
    SAY "on to the kernel", 13, 10
    jmp rax
.end:
    END 0

    align 8
gdt:
    dq 0
CODE32  equ $ - gdt
    dq 0x00CF9B000000FFFF       ; 4 GiB, 32-bit code
DATA    equ $ - gdt
    dq 0x00CF93000000FFFF       ; 4 GiB, data
CODE64  equ $ - gdt
    dq 0x00AF9B000000FFFF       ; the L bit instead of D: 64-bit code
gdt_pointer:
    dw $ - gdt - 1
    dd gdt
