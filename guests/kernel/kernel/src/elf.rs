//! Reading an ELF64 executable: which bytes go where, with which rights. (ELF-64 Object File Format
//! 1.5.)

/// One `PT_LOAD` segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment<'a> {
    /// Where it starts in memory.
    pub address: u64,
    /// Its bytes in the file.
    pub bytes: &'a [u8],
    /// Its length in memory; what goes beyond `bytes` is zero.
    pub length: u64,
    /// May be written (`PF_W`).
    pub write: bool,
    /// May be executed (`PF_X`).
    pub execute: bool,
}

/// Why a file cannot be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// Not a 64-bit little-endian x86-64 executable.
    NotAnExecutable,
    /// A header or a segment lies outside the file.
    Truncated,
}

const PT_LOAD: u64 = 1;
const PROGRAM_HEADER_SIZE: usize = 56;

/// The entry point of an executable.
pub fn entry(file: &[u8]) -> Result<u64, Error> {
    let header = file.get(..64).ok_or(Error::Truncated)?;
    // Magic, ELFCLASS64, ELFDATA2LSB; e_type ET_EXEC; e_machine EM_X86_64.
    if header[..6] != *b"\x7fELF\x02\x01" || header[16..20] != [2, 0, 62, 0] {
        return Err(Error::NotAnExecutable);
    }
    number(header, 24, 8)
}

/// The segments of an executable.
pub fn segments(file: &[u8]) -> Result<impl Iterator<Item = Result<Segment<'_>, Error>>, Error> {
    entry(file)?;
    let table = number(file, 32, 8)?;
    let size = number(file, 54, 2)?;
    let count = number(file, 56, 2)?;
    let headers = (0..count).map(move |index| {
        let start = size.checked_mul(index).and_then(|offset| table.checked_add(offset));
        slice(file, start.ok_or(Error::Truncated)?, PROGRAM_HEADER_SIZE as u64)
    });
    Ok(headers
        .filter_map(move |header| header.and_then(|header| segment(file, header)).transpose()))
}

/// The segment that a program header describes, if it is one to load.
fn segment<'a>(file: &'a [u8], header: &[u8]) -> Result<Option<Segment<'a>>, Error> {
    if number(header, 0, 4)? != PT_LOAD {
        return Ok(None);
    }
    let flags = number(header, 4, 4)?;
    let bytes = slice(file, number(header, 8, 8)?, number(header, 32, 8)?)?;
    let length = number(header, 40, 8)?;
    if length < bytes.len() as u64 {
        return Err(Error::Truncated);
    }
    let address = number(header, 16, 8)?;
    let (execute, write) = (flags & 1 != 0, flags & 2 != 0);
    Ok(Some(Segment { address, bytes, length, write, execute }))
}

fn number(bytes: &[u8], offset: usize, size: usize) -> Result<u64, Error> {
    let field = bytes.get(offset..offset + size).ok_or(Error::Truncated)?;
    Ok(field.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)))
}

fn slice(file: &[u8], start: u64, length: u64) -> Result<&[u8], Error> {
    let end = start.checked_add(length).ok_or(Error::Truncated)?;
    file.get(start as usize..end as usize).ok_or(Error::Truncated)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> Vec<u8> {
        let mut file = vec![0; 64 + 2 * PROGRAM_HEADER_SIZE];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[16..20].copy_from_slice(&[2, 0, 62, 0]);
        file[24..32].copy_from_slice(&0x4000_0010_u64.to_le_bytes());
        file[32] = 64;
        file[54] = PROGRAM_HEADER_SIZE as u8;
        file[56] = 2;
        // The first header stays PT_NULL; the second loads three bytes at the end of the file.
        let start = file.len() as u64;
        let header = &mut file[64 + PROGRAM_HEADER_SIZE..];
        header[0] = 1;
        header[4] = 5;
        header[8..16].copy_from_slice(&start.to_le_bytes());
        header[16..24].copy_from_slice(&0x4000_0000_u64.to_le_bytes());
        header[32] = 3;
        header[40] = 7;
        file.extend(b"abc");
        file
    }

    #[test]
    fn a_segment_says_where_its_bytes_go() {
        let file = file();
        assert_eq!(entry(&file), Ok(0x4000_0010));
        let segments: Vec<_> = segments(&file).unwrap().collect();
        let expected =
            Segment { address: 0x4000_0000, bytes: b"abc", length: 7, write: false, execute: true };
        assert_eq!(segments, [Ok(expected)]);
    }

    #[test]
    fn no_truncation_of_a_file_gets_through() {
        let file = file();
        for length in 0..file.len() {
            let result: Result<Vec<_>, _> =
                segments(&file[..length]).and_then(|segments| segments.collect());
            assert_eq!(result, Err(Error::Truncated), "{length} bytes");
        }
    }

    #[test]
    fn offsets_that_wrap_around_are_caught() {
        let mut wrapping = file();
        wrapping[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(segments(&wrapping).unwrap().all(|segment| segment == Err(Error::Truncated)));
        assert_eq!(entry(&[0; 64]), Err(Error::NotAnExecutable));
    }
}
