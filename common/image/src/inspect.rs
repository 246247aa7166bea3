//! What a disk image's bytes say it is. Pure; reads a bounded header.
//!
//! An image comes from a stranger. A qcow2 header may name a backing file or a data file, which
//! QEMU would open with the host's rights and show to the guest; a VMDK descriptor may list any
//! file as an extent. So nothing that refers to another file is let in, the format is told to
//! QEMU and never guessed, and a raw image must not look like any of those formats.

mod foreign;

use stackhand_model::ImageFormat;

/// Bytes at the beginning of an image that are looked at.
pub const HEADER_BYTES: usize = 64 << 10;

/// Bytes at its end that are looked at.
pub const TAIL_BYTES: usize = 512;

/// The parts of an image that are looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// Its first [`HEADER_BYTES`], or all.
    pub header: Vec<u8>,
    /// Its last [`TAIL_BYTES`], or all.
    pub tail: Vec<u8>,
    /// Its length.
    pub bytes: u64,
}

/// What an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inspected {
    /// Size of the disk that it holds; `None` if its header does not tell.
    pub virtual_bytes: Option<u64>,
}

/// Why an image is not let in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The bytes are something else than the document says.
    #[error("the document says {declared:?}, the bytes are {found}")]
    Mismatch {
        /// What the document says.
        declared: ImageFormat,
        /// What the bytes look like.
        found: &'static str,
    },
    /// It refers to something outside itself.
    #[error("it refers to another file ({what}), which could be any file of this host")]
    Refers {
        /// By what.
        what: &'static str,
    },
    /// It is damaged or made to confuse.
    #[error("its header makes no sense: {what}")]
    Malformed {
        /// What is wrong.
        what: &'static str,
    },
    /// It would become too large.
    #[error("its disk has {bytes} bytes and the limit is {most}; see max_image_gib")]
    TooLarge {
        /// Size of its disk.
        bytes: u64,
        /// The limit.
        most: u64,
    },
}

/// Judges an image.
///
/// # Errors
///
/// Refuses what is not what it should be, refers to other files, or is too large.
pub fn inspect(
    declared: ImageFormat,
    sample: &Sample,
    most_bytes: u64,
) -> Result<Inspected, Refused> {
    let header = sample.header.as_slice();
    let found = look(header);
    let mismatch = Refused::Mismatch { declared, found };
    let virtual_bytes = match (declared, found) {
        (ImageFormat::Qcow2, "qcow2") => Some(qcow2(header)?),
        (ImageFormat::Vmdk, "vmdk") => Some(foreign::vmdk(header)?),
        // One of fixed size has its header at its end alone.
        (ImageFormat::Vhd, "vhd" | "raw") => {
            Some(foreign::vhd(&sample.tail).ok_or(mismatch).and_then(|found| found)?)
        }
        // The size is in a table that may lie anywhere; QEMU's tool tells it.
        (ImageFormat::Vhdx, "vhdx") => None,
        (ImageFormat::Vdi, "vdi") => Some(foreign::vdi(header)?),
        (ImageFormat::Iso, "raw") if foreign::is_iso(header) => Some(sample.bytes),
        (
            ImageFormat::Raw | ImageFormat::Ami | ImageFormat::Kernel | ImageFormat::Ramdisk,
            "raw",
        ) => Some(sample.bytes),
        _ => return Err(mismatch),
    };
    match virtual_bytes {
        Some(0) => Err(Refused::Malformed { what: "it is empty" }),
        Some(bytes) if bytes > most_bytes => Err(Refused::TooLarge { bytes, most: most_bytes }),
        virtual_bytes => Ok(Inspected { virtual_bytes }),
    }
}

/// What the bytes look like; `raw` if like nothing in particular.
fn look(header: &[u8]) -> &'static str {
    let at = |offset: usize, magic: &[u8]| header.get(offset..offset + magic.len()) == Some(magic);
    if at(0, b"QFI\xfb") {
        "qcow2"
    } else if at(0, b"KDMV") || at(0, b"COWD") || starts_as_descriptor(header) {
        "vmdk"
    } else if at(0, b"conectix") {
        "vhd"
    } else if at(0, b"vhdxfile") {
        "vhdx"
    } else if at(0x40, &[0x7f, 0x10, 0xda, 0xbe]) {
        "vdi"
    } else if at(0, b"QED\0") {
        "qed"
    } else if at(0, b"LUKS\xba\xbe") {
        "luks"
    } else if at(0, b"WithoutFreeSpace") || at(0, b"WithouFreSpacExt") {
        "parallels"
    } else if at(0, b"Bochs Virtual HD Image") {
        "bochs"
    } else {
        "raw"
    }
}

/// QEMU takes a text for a VMDK descriptor if its first lines are comments or blank and one then
/// says `# Disk DescriptorFile` or `version=`.
fn starts_as_descriptor(header: &[u8]) -> bool {
    let text = &header[..header.len().min(2048)];
    for line in text.split(|&byte| byte == b'\n') {
        let line = line.trim_ascii();
        if line.starts_with(b"# Disk DescriptorFile") || line.starts_with(b"version=") {
            return true;
        }
        if !line.is_empty() && !line.starts_with(b"#") {
            return false;
        }
    }
    false
}

/// Reads a qcow2 header; gives the size of its disk.
fn qcow2(header: &[u8]) -> Result<u64, Refused> {
    let malformed = |what| Refused::Malformed { what };
    let short = malformed("it is cut short");
    let u32_at = |offset: usize| {
        let bytes = header.get(offset..offset + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map(u32::from_be_bytes).ok_or_else(|| short.clone())
    };
    let u64_at = |offset: usize| {
        let bytes = header.get(offset..offset + 8).and_then(|bytes| bytes.try_into().ok());
        bytes.map(u64::from_be_bytes).ok_or_else(|| short.clone())
    };
    let version = u32_at(4)?;
    if !(2..=3).contains(&version) {
        return Err(malformed("its version is neither 2 nor 3"));
    }
    if u64_at(8)? != 0 || u32_at(16)? != 0 {
        return Err(Refused::Refers { what: "a backing file" });
    }
    if !(9..=21).contains(&u32_at(20)?) {
        return Err(malformed("its cluster size is out of range"));
    }
    let size = u64_at(24)?;
    if u32_at(32)? != 0 {
        return Err(malformed("it is encrypted, which is not supported"));
    }
    let header_length = if version == 3 {
        // Bits: 0 dirty, 1 corrupt, 2 external data file, 3 compression type, 4 extended L2.
        let incompatible = u64_at(72)?;
        if incompatible & 4 != 0 {
            return Err(Refused::Refers { what: "an external data file" });
        }
        if incompatible & 2 != 0 {
            return Err(malformed("it is marked as damaged"));
        }
        if incompatible & !0b11001 != 0 {
            return Err(malformed("it needs features that are not known"));
        }
        usize::try_from(u32_at(100)?).unwrap_or(usize::MAX)
    } else {
        72
    };
    if !(72..=4096).contains(&header_length) {
        return Err(malformed("its header length is out of range"));
    }
    // Extensions follow: type, length, data, padded to eight bytes.
    let mut offset = header_length;
    loop {
        match u32_at(offset)? {
            0 => break,
            0xe279_2aca => return Err(Refused::Refers { what: "the format of a backing file" }),
            0x4441_5441 => return Err(Refused::Refers { what: "the name of a data file" }),
            _ => {}
        }
        let length = usize::try_from(u32_at(offset + 4)?).unwrap_or(usize::MAX);
        if length > HEADER_BYTES {
            return Err(malformed("an extension of its header is too long"));
        }
        offset += 8 + length.next_multiple_of(8);
    }
    if size % 512 != 0 {
        return Err(malformed("its size is no multiple of 512 bytes"));
    }
    Ok(size)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMIT: u64 = 1 << 40;

    /// A header of version 3 without extensions.
    fn good() -> Vec<u8> {
        let mut header = vec![0; 512];
        header[..4].copy_from_slice(b"QFI\xfb");
        header[7] = 3;
        header[23] = 16;
        header[24..32].copy_from_slice(&(10_u64 << 30).to_be_bytes());
        header[103] = 104;
        header
    }

    fn with(offset: usize, bytes: &[u8]) -> Vec<u8> {
        let mut header = good();
        header[offset..offset + bytes.len()].copy_from_slice(bytes);
        header
    }

    fn sample(header: &[u8], bytes: u64) -> Sample {
        let tail = header[header.len().saturating_sub(TAIL_BYTES)..].to_vec();
        Sample { header: header.to_vec(), tail, bytes }
    }

    fn judge(header: &[u8]) -> Result<u64, Refused> {
        let image = inspect(ImageFormat::Qcow2, &sample(header, 200_000), LIMIT)?;
        Ok(image.virtual_bytes.unwrap())
    }

    #[test]
    fn a_plain_qcow2_is_let_in_with_the_size_of_its_disk() {
        assert_eq!(judge(&good()), Ok(10 << 30));
        let mut old = good();
        old[7] = 2;
        old[72..112].fill(0);
        assert_eq!(judge(&old), Ok(10 << 30));
    }

    #[test]
    fn whatever_refers_to_another_file_is_refused() {
        for header in [
            with(8, &0x200_u64.to_be_bytes()),
            with(16, &11_u32.to_be_bytes()),
            with(72, &4_u64.to_be_bytes()),
            with(104, &0xe279_2aca_u32.to_be_bytes()),
            with(104, &0x4441_5441_u32.to_be_bytes()),
        ] {
            assert!(matches!(judge(&header), Err(Refused::Refers { .. })), "{:?}", judge(&header));
        }
        // Behind an extension that is harmless.
        let mut header = with(104, &[0x68, 0x03, 0xf8, 0x57, 0, 0, 0, 9]);
        header[104 + 8 + 16..][..4].copy_from_slice(&0x4441_5441_u32.to_be_bytes());
        assert!(matches!(judge(&header), Err(Refused::Refers { .. })));
    }

    #[test]
    fn a_petabyte_and_an_empty_disk_are_refused() {
        let petabyte = judge(&with(24, &(1_u64 << 50).to_be_bytes()));
        assert!(matches!(petabyte, Err(Refused::TooLarge { .. })), "{petabyte:?}");
        assert!(judge(&with(24, &[0; 8])).is_err());
        assert!(inspect(ImageFormat::Raw, &sample(&[], 0), LIMIT).is_err());
    }

    #[test]
    fn damaged_encrypted_and_unknown_ones_are_refused() {
        for header in [
            with(72, &2_u64.to_be_bytes()),
            with(72, &(1_u64 << 40).to_be_bytes()),
            with(32, &1_u32.to_be_bytes()),
            with(4, &9_u32.to_be_bytes()),
            with(20, &40_u32.to_be_bytes()),
            with(100, &1_u32.to_be_bytes()),
            with(100, &u32::MAX.to_be_bytes()),
            with(104, &[1, 1, 1, 1, 0xff, 0xff, 0xff, 0xff]),
            good()[..60].to_vec(),
        ] {
            assert!(
                matches!(judge(&header), Err(Refused::Malformed { .. })),
                "{:?}",
                judge(&header)
            );
        }
    }

    #[test]
    fn raw_that_is_something_else_is_refused() {
        let vmdk = b"# Disk DescriptorFile\nversion=1\nRW 63 FLAT \"/etc/shadow\" 0\n";
        let hidden = b"\n# a comment\n\nversion=1\nRW 63 FLAT \"/etc/shadow\" 0\n";
        for (header, name) in [
            (good(), "qcow2"),
            (vmdk.to_vec(), "vmdk"),
            (hidden.to_vec(), "vmdk"),
            (b"vhdxfile".to_vec(), "vhdx"),
            (b"conectix".to_vec(), "vhd"),
        ] {
            for declared in [ImageFormat::Raw, ImageFormat::Kernel] {
                assert_eq!(
                    inspect(declared, &sample(&header, 4096), LIMIT),
                    Err(Refused::Mismatch { declared, found: name })
                );
            }
        }
        assert!(inspect(ImageFormat::Qcow2, &sample(&[0; 512], 4096), LIMIT).is_err());
        let disk = inspect(ImageFormat::Raw, &sample(&[0xeb; 512], 4096), LIMIT);
        assert_eq!(disk, Ok(Inspected { virtual_bytes: Some(4096) }));
    }

    proptest! {
        #[test]
        fn no_header_makes_it_panic_or_lets_a_reference_in(
            noise in proptest::collection::vec((0usize..512, any::<u8>()), 0..40), cut in 0usize..512,
        ) {
            let mut header = good();
            for (offset, byte) in noise {
                header[offset] = byte;
            }
            header.truncate(512 - cut);
            if judge(&header).is_ok() {
                prop_assert_eq!(&header[8..20], &[0; 12]);
                prop_assert!(header[7] == 2 || header[79] & 4 == 0);
            }
        }
    }
}
