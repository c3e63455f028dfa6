; The second stage: from a partition's boot sector to a 64-bit kernel out of its file system.
;
; It lies where the file system begins. Its first sector is the partition's boot sector, which the MBR loads; the
; others, in the sectors that the file system reserves for this, are loaded by the first.
;
;   1. the rest of itself                           here
;   2. the A20 gate: memory beyond the first MiB    a20.inc
;   3. the memory map                               e820.inc
;   4. the kernel's file, KERNEL.ELF                fat16.inc
;   5. its segments, where they belong              elf64.inc
;   6. the climb to long mode, and the jump         long_mode.inc
;
; Up to 5 everything is asked of the BIOS. It speaks 16-bit real mode: there is no way back to it from 6.
bits 16
org 0x7C00

%include "modes.inc"
%include "progress.inc"

; Memory of ours below the code, all in reach of segment 0: tables, what the kernel is told, a sector, the stack.
PML4        equ 0x1000          ; three tables, each a page
PDPT        equ 0x2000
PD          equ 0x3000
TABLES_END  equ 0x4000
BOOT_INFO   equ 0x5000
E820        equ 0x5020          ; up to E820_MAX ranges
SECTOR      equ 0x6000
STAGE2      equ 0x7C00          ; the stack grows down from here
; And above it, what is on its way beyond the first MiB.
BUFFER      equ 0x20000
BUFFER_SECTORS equ 64

MIB         equ 1 << 20
MAPPED      equ 1 << 30         ; our page tables reach to here

STAGE2_MAGIC equ 'MKS2'

; FAIL condition, text: gives up with this text if the flags say so.
%macro FAIL 2
    j%-1 %%well
    mov si, %2
    jmp fail
%%well:
%endmacro

    ; Every FAT partition begins with a jump over its own description, the BIOS parameter block. What stands there
    ; is the file system's and comes with it. (Microsoft, FAT: General Overview of On-Disk Format, "BPB".)
    jmp short start
    nop
struc BPB
            resb 11
.sector_size resw 1             ; in bytes
.cluster    resb 1              ; sectors in each
.reserved   resw 1              ; sectors from the boot sector to the first FAT
.fats       resb 1              ; copies of the FAT
.root       resw 1              ; entries of the root directory
.total16    resw 1              ; sectors in all; if 0, see below
            resb 1
.fat        resw 1              ; sectors of a FAT
            resw 2
.hidden     resd 1              ; sectors before the partition
.total32    resd 1
            resb 26
endstruc
    times BPB_size - ($ - $$) db 0
%define BPB(field) STAGE2 + BPB. %+ field

start:
    cli
    cld
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov sp, STAGE2
    jmp 0:here
here:
    sti
    mov [drive], dl
    PROGRESS 0x72
    mov si, loading
    call put_line
    mov eax, [BPB(hidden)]
    inc eax
    mov cx, SECTORS - 1
    mov bx, (STAGE2 + 512) >> 4
    mov es, bx
    call read_sectors
    cmp dword [magic], STAGE2_MAGIC
    FAIL ne, incomplete
    jmp loaded

%include "read.inc"
%include "fail.inc"

loading     db "stage 2: loading", 0
incomplete  db "stage 2: the rest of it is not where it should be", 0
unreadable  db "stage 2: cannot read the disk, error "
.code       db "00h", 0

    times 510 - ($ - $$) db 0
    dw 0xAA55

; ANCHOR: loaded
loaded:
    call check_processor
    PROGRESS 0x73
    call open_a20
    PROGRESS 0x74
    call read_memory_map
    PROGRESS 0x75
    call open_file_system
    call find_kernel
    PROGRESS 0x76
    mov si, reading
    call put_line
    call load_file
    PROGRESS 0x77
    call load_segments
    PROGRESS 0x78
    mov si, climbing
    call put_line
    jmp climb
; ANCHOR_END: loaded

reading     db "stage 2: loading KERNEL.ELF", 0
climbing    db "stage 2: to long mode, and into the kernel", 0

%include "a20.inc"
%include "e820.inc"
%include "fat16.inc"
%include "unreal.inc"
%include "elf64.inc"
%include "long_mode.inc"

    times (512 + 508 - ($ - $$) % 512) % 512 db 0
magic       dd STAGE2_MAGIC     ; the last thing to be loaded
SECTORS     equ ($ - $$) / 512
