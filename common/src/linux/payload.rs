//! Introduced by stage 08: a bzImage's payload, the compressed kernel, unpacked on the host.
//!
//! A bzImage brings its own decompressor, which takes most of a boot's time where each instruction is emulated.
//! The header says where in the file the compressed kernel lies (Linux boot protocol, 1.3 `payload_offset`), so
//! that a loader can do the work instead, at the host's full speed. Which format it is in, its first bytes tell;
//! its last four are the length of what comes out (Linux's `scripts/Makefile.lib`, "size_append").
//!
//! What comes out is a vmlinux: an ELF file for [`crate::elf`].

use std::fmt;
use std::io::{self, Read};

use bzip2::read::BzDecoder;
use flate2::read::GzDecoder;
use liblzma::read::XzDecoder;
use liblzma::stream::Stream;
use ruzstd::decoding::StreamingDecoder;
use thiserror::Error;

/// The most memory that LZMA may take, in bytes. `xz -9` makes 65 MiB necessary, Linux's own settings up to 128.
const LZMA_MEMORY: u64 = 192 << 20;

/// Why a payload cannot be unpacked.
#[derive(Debug, Error)]
pub enum Error {
    /// It begins like nothing that is known.
    #[error(
        "its compression is none of gzip, bzip2, LZMA, XZ, LZO, LZ4 and Zstandard: it begins with {0:02x?}"
    )]
    Format(Vec<u8>),
    /// It says that more comes out than there may.
    #[error("it says that it has {found} bytes unpacked, but its header says room for {most}")]
    TooLong {
        /// What its last four bytes say.
        found: u64,
        /// The header's `init_size`.
        most: u64,
    },
    /// What came out is shorter or longer than it said.
    #[error("it says that it has {said} bytes unpacked, {found} came out")]
    Length {
        /// What its last four bytes say.
        said: u64,
        /// How many came out before it ended or became too long.
        found: u64,
    },
    /// The compressed data contradict themselves.
    #[error("its {format} data are damaged: {source}")]
    Damaged {
        /// Their format.
        format: Format,
        /// What the decompressor says.
        source: io::Error,
    },
}

/// How a payload is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// DEFLATE in a gzip member (RFC 1952).
    Gzip,
    /// bzip2.
    Bzip2,
    /// LZMA in the file format of LZMA Utils, "LZMA alone".
    Lzma,
    /// LZMA2 in the XZ format, with a filter for x86 code before it.
    Xz,
    /// LZO1X in the format of `lzop`.
    Lzo,
    /// LZ4 in the "legacy frame": blocks of up to 8 MiB, each behind its length.
    Lz4,
    /// A Zstandard frame (RFC 8878).
    Zstd,
}

/// The first bytes of each format (Linux's `lib/decompress.c`).
const MAGICS: [(&[u8], Format); 7] = [
    (&[0x1F, 0x8B], Format::Gzip),
    (b"BZh", Format::Bzip2),
    (&[0x5D, 0x00, 0x00], Format::Lzma),
    (b"\xFD7zXZ\0", Format::Xz),
    (b"\x89LZO\0\r\n\x1A\n", Format::Lzo),
    (&LZ4_MAGIC, Format::Lz4),
    (&[0x28, 0xB5, 0x2F, 0xFD], Format::Zstd),
];

const LZ4_MAGIC: [u8; 4] = 0x184C_2102_u32.to_le_bytes();

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Gzip => "gzip",
            Self::Bzip2 => "bzip2",
            Self::Lzma => "LZMA",
            Self::Xz => "XZ",
            Self::Lzo => "LZO",
            Self::Lz4 => "LZ4",
            Self::Zstd => "Zstandard",
        })
    }
}

impl Format {
    /// The format of `payload`, by its first bytes.
    pub fn of(payload: &[u8]) -> Result<Self, Error> {
        MAGICS
            .into_iter()
            .find(|(magic, _)| payload.starts_with(magic))
            .map(|(_, format)| format)
            .ok_or_else(|| Error::Format(payload[..payload.len().min(4)].to_vec()))
    }
}

/// Unpacks `payload`, the last four bytes of which are the length of the result, at most `most` bytes.
///
/// No more memory is taken than the result, and the decompressor's window of at most 192 MiB.
pub fn unpack(payload: &[u8], most: u64) -> Result<Vec<u8>, Error> {
    let format = Format::of(payload)?;
    let Some((packed, length)) = payload.split_last_chunk::<4>() else {
        return Err(Error::Format(payload.to_vec()));
    };
    let said = u64::from(u32::from_le_bytes(*length));
    if said > most {
        return Err(Error::TooLong { found: said, most });
    }
    let damaged = |source| Error::Damaged { format, source };
    let size = said as usize;
    let unpacked = match format {
        Format::Lz4 => lz4(packed, size),
        Format::Lzo => lzo(packed, size),
        // For gzip the length is the end of the format itself.
        Format::Gzip => read(GzDecoder::new(payload), size),
        Format::Bzip2 => read(BzDecoder::new(packed), size),
        Format::Lzma => Stream::new_lzma_decoder(LZMA_MEMORY)
            .map_err(io::Error::from)
            .and_then(|stream| read(XzDecoder::new_stream(packed, stream), size)),
        Format::Xz => Stream::new_stream_decoder(LZMA_MEMORY, 0)
            .map_err(io::Error::from)
            .and_then(|stream| read(XzDecoder::new_stream(packed, stream), size)),
        Format::Zstd => StreamingDecoder::new(packed)
            .map_err(io::Error::other)
            .and_then(|decoder| read(decoder, size)),
    }
    .map_err(damaged)?;
    match unpacked.len() == size {
        true => Ok(unpacked),
        false => Err(Error::Length { said, found: unpacked.len() as u64 }),
    }
}

/// Reads what a decompressor gives, up to one byte more than the `size` that it should.
fn read(decoder: impl Read, size: usize) -> io::Result<Vec<u8>> {
    let mut unpacked = Vec::new();
    // The pages of what is reserved are taken when they are written to, not here.
    unpacked.try_reserve_exact(size + 1)?;
    decoder.take(size as u64 + 1).read_to_end(&mut unpacked)?;
    Ok(unpacked)
}

/// The "legacy frame" of LZ4 (its `doc/lz4_Frame_format.md`): after the magic number blocks, each behind its length
/// in 4 bytes, without an end mark.
fn lz4(packed: &[u8], size: usize) -> io::Result<Vec<u8>> {
    let mut rest = &packed[LZ4_MAGIC.len()..];
    let mut unpacked = vec![0; size];
    let mut done = 0;
    while !rest.is_empty() {
        let length = u32::from_le_bytes(array(&mut rest)?);
        let block = split(&mut rest, length)?;
        done += lz4_flex::block::decompress_into(block, &mut unpacked[done..])
            .map_err(io::Error::other)?;
    }
    unpacked.truncate(done);
    Ok(unpacked)
}

// The flags of a file of `lzop` that change its layout (lzop 1.04, `src/conf.h`).
const LZOP_ADLER32_UNPACKED: u32 = 1 << 0;
const LZOP_ADLER32_PACKED: u32 = 1 << 1;
const LZOP_EXTRA_FIELD: u32 = 1 << 6;
const LZOP_CRC32_UNPACKED: u32 = 1 << 8;
const LZOP_CRC32_PACKED: u32 = 1 << 9;
const LZOP_FILTER: u32 = 1 << 11;

/// The first version whose headers have all of today's fields.
const LZOP_MODERN: u16 = 0x0940;

/// A file of `lzop`: a header, then blocks, each behind both of its lengths and its checksums, up to a length of 0.
/// All numbers are big-endian (Linux's `lib/decompress_unlzo.c`).
fn lzo(packed: &[u8], size: usize) -> io::Result<Vec<u8>> {
    let mut rest = packed;
    split(&mut rest, 9)?; // the magic number
    let modern = u16::from_be_bytes(array(&mut rest)?) >= LZOP_MODERN;
    // The library's version, the version needed to unpack; the method, its level.
    split(&mut rest, if modern { 2 + 2 + 1 + 1 } else { 2 + 1 })?;
    let flags = u32::from_be_bytes(array(&mut rest)?);
    let any = |mask| flags & mask != 0;
    if any(LZOP_FILTER | LZOP_EXTRA_FIELD) {
        return Err(io::Error::other("it has a filter or a field that Linux doesn't know"));
    }
    split(&mut rest, if modern { 4 + 8 } else { 4 + 4 })?; // mode and time of the file
    let [name] = array(&mut rest)?;
    split(&mut rest, u32::from(name) + 4)?; // its name, the header's checksum

    let checksums =
        |masks: [u32; 2]| masks.into_iter().filter(|mask| any(*mask)).count() as u32 * 4;
    let of_unpacked = checksums([LZOP_ADLER32_UNPACKED, LZOP_CRC32_UNPACKED]);
    let of_packed = checksums([LZOP_ADLER32_PACKED, LZOP_CRC32_PACKED]);
    let mut unpacked = vec![0; size];
    let mut done = 0;
    loop {
        let to = u32::from_be_bytes(array(&mut rest)?);
        if to == 0 {
            break;
        }
        let from = u32::from_be_bytes(array(&mut rest)?);
        // A block that did not become smaller is stored as it is.
        let stored = from >= to;
        split(&mut rest, if stored { of_unpacked } else { of_unpacked + of_packed })?;
        let block = split(&mut rest, from)?;
        let room = unpacked
            .get_mut(done..done + to as usize)
            .ok_or_else(|| io::Error::other("more comes out than it says"))?;
        if stored {
            room.copy_from_slice(&block[..room.len()]);
        } else if lzo::decompress_into(block, room).map_err(io::Error::other)? != room.len() {
            return Err(io::Error::other("a block is shorter than it says"));
        }
        done += to as usize;
    }
    unpacked.truncate(done);
    Ok(unpacked)
}

/// Takes the next `size` bytes.
fn split<'a>(rest: &mut &'a [u8], size: u32) -> io::Result<&'a [u8]> {
    rest.split_off(..size as usize).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// Takes the next bytes as an array.
fn array<const N: usize>(rest: &mut &[u8]) -> io::Result<[u8; N]> {
    let (array, behind) = rest.split_first_chunk().ok_or(io::ErrorKind::UnexpectedEof)?;
    *rest = behind;
    Ok(*array)
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::Write;
    use std::sync::LazyLock;

    use liblzma::stream::{Filters, LzmaOptions};
    use proptest::prelude::*;

    use super::*;

    pub const FORMATS: [Format; 7] = [
        Format::Gzip,
        Format::Bzip2,
        Format::Lzma,
        Format::Xz,
        Format::Lzo,
        Format::Lz4,
        Format::Zstd,
    ];

    /// Something that compresses, but not to nothing.
    pub fn content(len: usize) -> Vec<u8> {
        let noise = (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 27) as u8);
        noise.zip(b"kernel ".iter().cycle()).map(|(noise, text)| noise / 31 + text).collect()
    }

    /// What Linux's build makes of a vmlinux, with the same settings of the same formats.
    pub fn pack(format: Format, content: &[u8]) -> Vec<u8> {
        let xz = |stream| {
            let mut encoder = liblzma::write::XzEncoder::new_stream(Vec::new(), stream);
            encoder.write_all(content).unwrap();
            encoder.finish().unwrap()
        };
        let mut packed = match format {
            Format::Gzip => {
                let level = flate2::Compression::best();
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), level);
                encoder.write_all(content).unwrap();
                return encoder.finish().unwrap();
            }
            Format::Bzip2 => {
                let level = bzip2::Compression::best();
                let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), level);
                encoder.write_all(content).unwrap();
                encoder.finish().unwrap()
            }
            Format::Lzma => {
                let options = LzmaOptions::new_preset(6).unwrap();
                xz(Stream::new_lzma_encoder(&options).unwrap())
            }
            Format::Xz => {
                let mut options = LzmaOptions::new_preset(6).unwrap();
                options.dict_size(32 << 20);
                let mut filters = Filters::new();
                filters.x86().lzma2(&options);
                let check = liblzma::stream::Check::Crc32;
                xz(Stream::new_stream_encoder(&filters, check).unwrap())
            }
            Format::Lzo => lzop(content),
            Format::Lz4 => {
                let block = |block: &[u8]| {
                    let packed = lz4_flex::block::compress(block);
                    [&(packed.len() as u32).to_le_bytes(), &packed[..]].concat()
                };
                let blocks: Vec<u8> = content.chunks(8 << 20).flat_map(block).collect();
                [&LZ4_MAGIC[..], &blocks].concat()
            }
            Format::Zstd => ruzstd::encoding::compress_to_vec(
                content,
                ruzstd::encoding::CompressionLevel::Fastest,
            ),
        };
        packed.extend((content.len() as u32).to_le_bytes());
        packed
    }

    /// A file as `lzop -9` makes it: checksums of what is unpacked, blocks of 256 KiB.
    fn lzop(content: &[u8]) -> Vec<u8> {
        let mut file = b"\x89LZO\0\r\n\x1A\n".to_vec();
        file.extend([0x10, 0x40, 0x20, 0xA0, 0x09, 0x40, 3, 9]);
        file.extend((0x0300_0000 | LZOP_ADLER32_UNPACKED).to_be_bytes());
        file.extend([0; 12]);
        file.extend(b"\x03abc");
        file.extend([0; 4]);
        for block in content.chunks(256 << 10) {
            let packed = lzokay_native::compress(block).unwrap();
            let packed = if packed.len() < block.len() { &packed } else { block };
            file.extend((block.len() as u32).to_be_bytes());
            file.extend((packed.len() as u32).to_be_bytes());
            file.extend([0; 4]);
            file.extend(packed);
        }
        file.extend([0; 4]);
        file
    }

    #[test]
    fn every_format_comes_out_as_it_went_in() {
        // More than a block of each format that has blocks.
        let long = content((8 << 20) + 70_000);
        for format in FORMATS {
            let long = if format == Format::Lz4 { &long } else { &long[..1 << 20] };
            for content in [long, b"x"] {
                let packed = pack(format, content);
                assert_eq!(Format::of(&packed).unwrap(), format);
                assert!(packed.len() < content.len() + 100, "{format}");
                let unpacked = unpack(&packed, content.len() as u64).unwrap();
                assert!(unpacked == content, "{format}");
            }
        }
    }

    #[test]
    fn every_truncation_is_refused() {
        for format in FORMATS {
            let packed = pack(format, &content(100_000));
            let length = packed[packed.len() - 4..].to_vec();
            for len in (0..packed.len() - 4).step_by(packed.len() / 50) {
                // With a length behind it that is right, for a wrong one is found at once.
                let cut = [&packed[..len], &length].concat();
                assert!(unpack(&cut, 100_000).is_err(), "{format} {len}");
            }
        }
    }

    #[test]
    fn more_than_there_may_be_is_refused_before_it_is_unpacked() {
        for format in FORMATS {
            let error = unpack(&pack(format, &content(100_000)), 99_999).unwrap_err();
            assert!(matches!(error, Error::TooLong { found: 100_000, most: 99_999 }), "{error}");
        }
    }

    #[test]
    fn a_length_that_is_not_the_real_one_is_refused() {
        // A bomb: 8 MiB of zeros behind the length of one.
        for format in FORMATS {
            let mut packed = pack(format, &vec![0; 8 << 20]);
            for said in [1_u32, (8 << 20) - 1, (8 << 20) + 1] {
                let at = packed.len() - 4;
                packed[at..].copy_from_slice(&said.to_le_bytes());
                let error = unpack(&packed, 1 << 30).unwrap_err();
                assert!(matches!(error, Error::Length { .. } | Error::Damaged { .. }), "{error}");
            }
        }
    }

    #[test]
    fn what_is_no_payload_is_told_by_its_first_bytes() {
        for (bytes, text) in [
            (&b""[..], "it begins with []"),
            (b"\x1F", "it begins with [1f]"),
            (b"\x7FELFxx", "it begins with [7f, 45, 4c, 46]"),
        ] {
            let error = unpack(bytes, 1 << 20).unwrap_err().to_string();
            assert!(error.ends_with(text), "{error}");
        }
        // Nothing but a magic number.
        for (magic, format) in MAGICS {
            assert!(unpack(magic, 1 << 20).is_err(), "{format}");
            let nothing = unpack(&[magic, &[0; 4]].concat(), 1 << 20);
            assert!(nothing.is_ok_and(|unpacked| unpacked.is_empty()) == (format == Format::Lz4));
        }
    }

    /// Packing takes longer than unpacking: once is enough.
    static PACKED: LazyLock<Vec<Vec<u8>>> =
        LazyLock::new(|| FORMATS.map(|format| pack(format, &content(20_000))).into());

    proptest! {
        #[test]
        fn damage_brings_no_decompressor_down(
            damages in prop::collection::vec((any::<prop::sample::Index>(), 0..8), 1..6),
        ) {
            for packed in &*PACKED {
                let mut packed = packed.clone();
                // The length stays, or nearly all would be refused for it.
                let len = packed.len() - 4;
                for (at, bit) in &damages {
                    packed[at.index(len)] ^= 1_u8 << bit;
                }
                if let Ok(unpacked) = unpack(&packed, 1 << 20) {
                    prop_assert_eq!(unpacked.len(), 20_000);
                }
            }
        }

        #[test]
        fn noise_behind_a_magic_number_brings_no_decompressor_down(
            which in 0..MAGICS.len(),
            noise in prop::collection::vec(any::<u8>(), 0..300),
            length in 0_u32..1 << 20,
        ) {
            let packed = [MAGICS[which].0, &noise, &length.to_le_bytes()].concat();
            let _ = unpack(&packed, 1 << 20);
        }
    }
}
