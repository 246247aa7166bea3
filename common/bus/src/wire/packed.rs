//! Compressed bodies, as Python's programs send them where `kombu_compression` is set. They are
//! read and never sent: nobody who talks to us needs the option.

use std::io::Read;

use super::MAX_BODY;
use crate::BusError;

/// Unpacks a body by the method that its sender's `compression` header names.
///
/// # Errors
///
/// [`BusError::Malformed`] for another method, for a body that was not packed with it, and for
/// one that unpacks to more than [`MAX_BODY`].
pub fn unpack(method: &str, body: &[u8]) -> Result<Vec<u8>, BusError> {
    // The name says gzip, the bytes are a zlib stream.
    match method {
        "application/x-gzip" => read(flate2::read::ZlibDecoder::new(body), method),
        "application/x-bz2" => read(bzip2::read::BzDecoder::new(body), method),
        _ => {
            let shown: String = method.chars().take(80).collect();
            Err(BusError::Malformed(format!(
                "the body is compressed by {shown:?}; set kombu_compression to gzip or bzip2 at \
                 the sender, or unset it"
            )))
        }
    }
}

fn read(packed: impl Read, method: &str) -> Result<Vec<u8>, BusError> {
    let most = u64::try_from(MAX_BODY).unwrap_or(u64::MAX);
    let mut body = Vec::new();
    packed.take(most.saturating_add(1)).read_to_end(&mut body).map_err(|error| {
        BusError::Malformed(format!("the body does not unpack as {method}: {error}"))
    })?;
    if body.len() > MAX_BODY {
        let what = format!("the body unpacks to more than the {MAX_BODY} bytes accepted");
        return Err(BusError::Malformed(what));
    }
    Ok(body)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn zlib(body: &[u8]) -> Vec<u8> {
        let mut packer = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
        packer.write_all(body).unwrap();
        packer.finish().unwrap()
    }

    fn bz2(body: &[u8]) -> Vec<u8> {
        let mut packer = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
        packer.write_all(body).unwrap();
        packer.finish().unwrap()
    }

    #[test]
    fn both_methods_that_python_offers_are_unpacked() {
        let body = "grüß ".repeat(1000).into_bytes();
        assert_eq!(unpack("application/x-gzip", &zlib(&body)).unwrap(), body);
        assert_eq!(unpack("application/x-bz2", &bz2(&body)).unwrap(), body);
    }

    #[test]
    fn what_does_not_unpack_or_unpacks_to_too_much_is_refused() {
        let gzip = "application/x-gzip";
        let bomb = zlib(&vec![b' '; MAX_BODY + 1]);
        assert!(bomb.len() < MAX_BODY / 100, "it is small on the wire");
        let cut = zlib(&[7; 1000]);
        for (method, body, words) in [
            (gzip, bomb.as_slice(), "more than"),
            ("application/x-bz2", &bz2(&vec![b' '; MAX_BODY + 1]), "more than"),
            (gzip, &cut[..cut.len() / 2], "does not unpack"),
            (gzip, b"{}", "does not unpack"),
            ("application/x-bz2", b"BZh9", "does not unpack"),
            ("application/zstd", b"{}", "gzip or bzip2"),
        ] {
            let error = unpack(method, body).unwrap_err().to_string();
            assert!(error.contains(words), "{method}: {error}");
        }
        assert_eq!(unpack(gzip, &zlib(b"")).unwrap(), b"");
    }
}
