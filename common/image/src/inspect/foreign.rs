//! Formats of other hypervisors, which are converted before anything is laid over them.
//!
//! What is checked here is what QEMU's drivers would follow out of the file: a VMDK's parent and
//! extents, a VHD's or VDI's parent. Sizes are checked again against what QEMU's tool finds.

use super::Refused;

/// Where QEMU looks for the descriptor inside a VMDK, and how far.
const DESCRIPTOR: std::ops::Range<usize> = 0x200..0x200 + 20 * 512;

/// Reads a sparse VMDK; gives the size of its disk.
pub(super) fn vmdk(header: &[u8]) -> Result<u64, Refused> {
    if !header.starts_with(b"KDMV") {
        // A text, or one of the old kind: both name other files by their nature.
        return Err(Refused::Refers { what: "extents in files of their own" });
    }
    let short = Refused::Malformed { what: "it is cut short" };
    let capacity = u64_le(header, 12).ok_or_else(|| short.clone())?;
    if capacity == 0 {
        // QEMU would then take the descriptor inside for a list of files.
        return Err(Refused::Refers { what: "extents in its descriptor" });
    }
    let end = DESCRIPTOR.end.min(header.len());
    let descriptor = header.get(DESCRIPTOR.start..end).ok_or(short)?;
    let has = |word: &[u8]| {
        descriptor.windows(word.len()).any(|window| window.eq_ignore_ascii_case(word))
    };
    if has(b"parentFileNameHint") {
        return Err(Refused::Refers { what: "a parent" });
    }
    let sparse = [&b"\"monolithicSparse\""[..], &b"\"streamOptimized\""[..]];
    if has(b"createType") && !sparse.into_iter().any(has) {
        return Err(Refused::Refers { what: "extents, by its createType" });
    }
    capacity.checked_mul(512).ok_or(Refused::Malformed { what: "its size is out of range" })
}

/// Reads the footer of a VHD; gives the size of its disk. `None`: there is no footer.
pub(super) fn vhd(tail: &[u8]) -> Option<Result<u64, Refused>> {
    let footer = tail.get(tail.len().checked_sub(512)?..)?;
    if !footer.starts_with(b"conectix") {
        return None;
    }
    let kind = footer.get(60..64)?.try_into().ok().map(u32::from_be_bytes)?;
    let size = footer.get(48..56)?.try_into().ok().map(u64::from_be_bytes)?;
    Some(match kind {
        2 | 3 => Ok(size),
        4 => Err(Refused::Refers { what: "a parent" }),
        _ => Err(Refused::Malformed { what: "its type is not known" }),
    })
}

/// Reads the header of a VDI; gives the size of its disk.
pub(super) fn vdi(header: &[u8]) -> Result<u64, Refused> {
    let short = Refused::Malformed { what: "it is cut short" };
    let kind = u32_le(header, 0x4c).ok_or_else(|| short.clone())?;
    if !(1..=2).contains(&kind) {
        return Err(Refused::Refers { what: "a parent, by its type" });
    }
    let size = u64_le(header, 0x170).ok_or_else(|| short.clone())?;
    // The UUIDs of the image before it in a chain, and of that one's last change.
    if header.get(0x1a8..0x1c8).ok_or(short)?.iter().any(|&byte| byte != 0) {
        return Err(Refused::Refers { what: "a parent" });
    }
    Ok(size)
}

/// Whether it is a CD: the second sector after the system area says so.
pub(super) fn is_iso(header: &[u8]) -> bool {
    header.get(0x8001..0x8006) == Some(b"CD001")
}

fn u32_le(header: &[u8], offset: usize) -> Option<u32> {
    header.get(offset..offset + 4)?.try_into().ok().map(u32::from_le_bytes)
}

fn u64_le(header: &[u8], offset: usize) -> Option<u64> {
    header.get(offset..offset + 8)?.try_into().ok().map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::super::{HEADER_BYTES, Sample, inspect};
    use super::*;
    use proptest::prelude::*;
    use stackhand_model::ImageFormat;

    const LIMIT: u64 = 1 << 40;

    fn judge(format: ImageFormat, header: &[u8], tail: &[u8]) -> Result<Option<u64>, Refused> {
        let sample = Sample { header: header.to_vec(), tail: tail.to_vec(), bytes: 1 << 20 };
        inspect(format, &sample, LIMIT).map(|image| image.virtual_bytes)
    }

    fn sparse_vmdk(descriptor: &str) -> Vec<u8> {
        let mut header = vec![0; 16 << 10];
        header[..4].copy_from_slice(b"KDMV");
        header[12..20].copy_from_slice(&2048_u64.to_le_bytes());
        header[512..512 + descriptor.len()].copy_from_slice(descriptor.as_bytes());
        header
    }

    #[test]
    fn a_sparse_vmdk_is_let_in_and_one_that_names_files_is_not() {
        let good = sparse_vmdk("createType=\"streamOptimized\"\nRW 2048 SPARSE \"x.vmdk\"\n");
        assert_eq!(judge(ImageFormat::Vmdk, &good, &[]), Ok(Some(1 << 20)));
        let mut no_capacity = good;
        no_capacity[12..20].fill(0);
        for header in [
            b"# Disk DescriptorFile\nversion=1\nRW 63 FLAT \"/etc/shadow\" 0\n".to_vec(),
            b"COWD".to_vec(),
            no_capacity,
            sparse_vmdk("parentFileNameHint=\"/etc/shadow\"\n"),
            sparse_vmdk("createType=\"monolithicFlat\"\nRW 63 FLAT \"/etc/shadow\" 0\n"),
        ] {
            let judged = judge(ImageFormat::Vmdk, &header, &[]);
            assert!(matches!(judged, Err(Refused::Refers { .. })), "{judged:?}");
        }
    }

    #[test]
    fn a_vhd_tells_its_size_at_its_end_and_one_with_a_parent_is_refused() {
        let mut footer = vec![0; 512];
        footer[..8].copy_from_slice(b"conectix");
        footer[48..56].copy_from_slice(&(5_u64 << 20).to_be_bytes());
        footer[63] = 2;
        assert_eq!(judge(ImageFormat::Vhd, &[0; 512], &footer), Ok(Some(5 << 20)));
        assert_eq!(judge(ImageFormat::Vhd, &footer, &footer), Ok(Some(5 << 20)));
        footer[63] = 4;
        let judged = judge(ImageFormat::Vhd, &footer, &footer);
        assert!(matches!(judged, Err(Refused::Refers { .. })), "{judged:?}");
        let judged = judge(ImageFormat::Vhd, &[0; 512], &[0; 512]);
        assert!(matches!(judged, Err(Refused::Mismatch { .. })), "{judged:?}");
    }

    #[test]
    fn a_vdi_with_a_parent_and_one_of_a_petabyte_are_refused() {
        let mut header = vec![0; 512];
        header[0x40..0x44].copy_from_slice(&[0x7f, 0x10, 0xda, 0xbe]);
        header[0x4c] = 1;
        header[0x170..0x178].copy_from_slice(&(1_u64 << 30).to_le_bytes());
        assert_eq!(judge(ImageFormat::Vdi, &header, &[]), Ok(Some(1 << 30)));
        header[0x1b8] = 1;
        let judged = judge(ImageFormat::Vdi, &header, &[]);
        assert!(matches!(judged, Err(Refused::Refers { .. })), "{judged:?}");
        header[0x1b8] = 0;
        header[0x170..0x178].copy_from_slice(&(1_u64 << 50).to_le_bytes());
        let judged = judge(ImageFormat::Vdi, &header, &[]);
        assert!(matches!(judged, Err(Refused::TooLarge { .. })), "{judged:?}");
    }

    #[test]
    fn a_cd_is_known_by_its_volume_descriptor() {
        let mut header = vec![0; HEADER_BYTES];
        assert!(judge(ImageFormat::Iso, &header, &[]).is_err());
        header[0x8001..0x8006].copy_from_slice(b"CD001");
        assert_eq!(judge(ImageFormat::Iso, &header, &[]), Ok(Some(1 << 20)));
        // What begins as a qcow2 is none.
        header[..4].copy_from_slice(b"QFI\xfb");
        assert!(judge(ImageFormat::Iso, &header, &[]).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(
            magic in prop::sample::select(vec![&b"KDMV"[..], b"conectix", b"vhdxfile", b"x"]),
            noise in proptest::collection::vec(any::<u8>(), 0..700),
        ) {
            let bytes = [magic, &noise].concat();
            for format in
                [ImageFormat::Vmdk, ImageFormat::Vhd, ImageFormat::Vhdx, ImageFormat::Vdi]
            {
                let _judged = judge(format, &bytes, &bytes);
            }
        }
    }
}
